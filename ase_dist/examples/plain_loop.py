"""The layer in a plain PyTorch loop: two tasks that want different things of the same tokens, no process group."""

import torch
from timm.layers import Mlp  # any module with fc1, act and fc2
from torch.nn.functional import mse_loss

from ase_dist.moe import MoEFFN  # or ASEMoE, the same layer for DeepSpeed

TASKS, TOKENS, WIDTH = 2, 64, 32


def main() -> tuple[list[float], list[list[float]]]:
    """Train for 150 steps; the losses, and each expert's mean gate by task."""
    torch.manual_seed(0)
    x = torch.randn(TASKS, TOKENS, WIDTH)  # [tasks, ..., width]
    target = torch.stack([x[0].roll(1, dims=-1), -x[1]])

    ffn = Mlp(WIDTH, 64)  # of a pretrained model; the layer freezes it and trains its own experts and routers
    layer = MoEFFN(ffn, num_experts=8, k=2, num_shared=1, rank=4, num_tasks=TASKS)
    optimizer = torch.optim.AdamW((p for p in layer.parameters() if p.requires_grad), lr=1e-2)

    losses = []
    for step in range(150):
        output, aux_loss, _counts, gates = layer(x)  # aux_loss is weighted already; gates [tasks, experts]
        loss = mse_loss(output, target)
        (loss + aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step:3}: loss {loss.item():.3f}")

    print(f"step {step:3}: loss {losses[-1]:.3f}")
    for task, row in enumerate(gates.tolist()):
        print(f"task {task}: mean gates", " ".join(f"{gate:.2f}" for gate in row), "(the last expert is shared)")
    return losses, gates.tolist()


if __name__ == "__main__":
    main()
