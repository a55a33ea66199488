"""ASEMoE under DeepSpeed in a loop of your own, where ``deepspeed.moe.layer.MoE`` stood; what changes is marked.

The same file runs with ``python``, ``torchrun`` and ``deepspeed``, the experts divided among the ranks.
"""

import deepspeed
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ase_dist.moe import ASEMoE, optimizer_groups
from ase_dist.training.process import runtime

TASKS, WIDTH = 2, 32


class Model(nn.Module):
    """One MoE layer and a head."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        # before: MoE(WIDTH, expert=Mlp(WIDTH, 64), num_experts=8, k=2, ep_size=ranks)
        self.ffn = ASEMoE(Mlp(WIDTH, 64), num_experts=8, k=2, num_shared=1, rank=4, num_tasks=TASKS, ep_size=ranks)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions and the router loss for x [tasks, tokens, width]; before: [tokens, width]."""
        output, aux_loss, _counts = self.ffn(x)
        return self.head(x + output), aux_loss


def main() -> list[float]:
    """Train for 40 steps of ZeRO 2; the losses."""
    world = runtime.start(timeout=600, threads=1)  # or deepspeed.init_distributed() where a launcher is always used
    torch.manual_seed(0)
    model = Model(world.size)
    # before: split_params_into_different_moe_groups_for_optimizer; the base under the experts is frozen now
    trained = {"name": "trained", "params": [p for p in model.parameters() if p.requires_grad]}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(optimizer_groups([trained]), lr=1e-2),
        config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}},
    )
    x = torch.randn(TASKS, 64, WIDTH, device=world.device)
    target = torch.stack([x[0, :, :4], -x[1, :, 4:8]])
    losses = []
    for _step in range(40):
        prediction, aux_loss = engine(x)
        loss = (prediction - target).square().mean()
        engine.backward(loss + aux_loss)  # aux_loss is weighted already
        engine.step()
        losses.append(loss.item())
    runtime.stop()
    print(f"rank {world.rank}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
