"""A timm vision transformer with experts in its FFNs: it computes what it did before until they are trained."""

import timm
import torch

from ase_dist.models import pretrained
from ase_dist.moe import MoEFFN, TaskFFN, router_loss, set_tasks

TASKS = 2


def main() -> dict[str, float]:
    """The change of the outputs by the experts alone, and the loss of two tasks before and after training."""
    vit = timm.create_model("vit_mini_patch8_128", num_classes=0)  # any timm ViT; pretrained=True fetches weights,
    pretrained.load(vit, "scenes", name="vit_mini_patch8_128")  # those of this one come with the package
    vit.eval().requires_grad_(False)
    torch.manual_seed(0)
    images = torch.rand(2, 3, 128, 128)
    before = vit(images)

    for seed, block in enumerate(vit.blocks):  # these two lines are all there is to it
        block.mlp = TaskFFN(MoEFFN(block.mlp, num_experts=8, k=2, rank=4, num_tasks=TASKS, seed=seed))

    set_tasks(vit, [1])  # the images are task 1's
    change = (vit(images) - before).abs().max().item()
    print(f"largest change of an output by untrained experts: {change:.1e}")

    set_tasks(vit, range(TASKS))  # the first half of a batch is task 0's, the other task 1's
    both = images.repeat(TASKS, 1, 1, 1)
    target = torch.cat([before.roll(1, dims=-1), before.flip(-1)])
    optimizer = torch.optim.AdamW((p for p in vit.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _step in range(12):
        loss = (vit(both) - target).square().mean()
        (loss + router_loss(vit)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    trained = sum(p.numel() for p in vit.parameters() if p.requires_grad)
    print(
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {trained:,} of {sum(p.numel() for p in vit.parameters()):,} trained"
    )
    return {"change": change, "first": losses[0], "last": losses[-1]}


if __name__ == "__main__":
    main()
