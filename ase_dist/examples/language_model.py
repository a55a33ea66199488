"""A small causal language model with experts in its FFNs: say a word again, or backwards, as the router knows."""

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from ase_dist.moe import MoEFFN

TASKS, LETTERS, LENGTH, WIDTH = ("copy", "reverse"), 8, 5, 64


class Block(nn.Module):
    """Causal attention, then an FFN with experts, for all tasks at once: x [tasks, B, T, D]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ffn = MoEFFN(Mlp(WIDTH, 2 * WIDTH), num_experts=8, k=2, rank=8, num_tasks=len(TASKS), seed=seed)
        self.ffn.requires_grad_(True)  # the FFN under the experts too: nothing here is pretrained

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, the router loss and the mean gates [tasks, experts]."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        output, aux_loss, _counts, gates = self.ffn(self.norm2(x))
        return x + output, aux_loss, gates


def main() -> tuple[dict[str, list[float]], list[list[float]]]:
    """Train for 80 steps; the losses by task, and the first layer's mean gates by task."""
    torch.manual_seed(0)
    embed, place = nn.Embedding(LETTERS + 1, WIDTH), nn.Parameter(torch.randn(2 * LENGTH, WIDTH))
    blocks, head = nn.ModuleList([Block(seed) for seed in range(2)]), nn.Linear(WIDTH, LETTERS)
    optimizer = torch.optim.AdamW([place, *nn.ModuleList([embed, blocks, head]).parameters()], lr=3e-3)
    losses: dict[str, list[float]] = {task: [] for task in TASKS}
    for step in range(80):
        word = torch.randint(LETTERS, (32, LENGTH))
        answer = torch.stack([word, word.flip(-1)])  # [tasks, B, T]
        prompt = F.pad(word, (0, 1), value=LETTERS).expand(len(TASKS), -1, -1)  # the same for both, and a full stop
        x = embed(torch.cat([prompt, answer[..., :-1]], dim=-1)) + place
        x, loss_1, gates = blocks[0](x)
        x, loss_2, _gates = blocks[1](x)
        by_task = F.cross_entropy(head(x[..., LENGTH:, :]).movedim(-1, 1), answer, reduction="none").mean(dim=(1, 2))
        (by_task.sum() + loss_1 + loss_2).backward()  # the routers' losses are weighted already
        optimizer.step()
        optimizer.zero_grad()
        for task, loss in zip(TASKS, by_task.tolist(), strict=True):
            losses[task].append(loss)
        if step % 16 == 15:
            print(f"step {step + 1:3}:", ", ".join(f"{task} {losses[task][-1]:.3f}" for task in TASKS))
    for task, row in zip(TASKS, gates.tolist(), strict=True):
        print(f"{task:8} mean gates", " ".join(f"{gate:.2f}" for gate in row))
    return losses, gates.tolist()


if __name__ == "__main__":
    main()
