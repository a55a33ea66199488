"""A Llama of Hugging Face with LoRA experts on its gated FFNs. Needs ``pip install transformers``; loads nothing."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ase_dist.moe import MoEFFN, TaskFFN, router_loss, set_tasks

TASKS = 2


def main() -> dict[str, float]:
    """The change of the logits by the experts alone, and the loss of two tasks before and after training."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)  # or LlamaForCausalLM.from_pretrained(...)
    tokens = torch.randint(64, (8, 16))
    before = model(tokens).logits

    for seed, layer in enumerate(model.model.layers):
        places = ("gate", "up", "fc2")  # gate_proj, up_proj and down_proj; "fc1" would be one pair for the first two
        experts = MoEFFN(layer.mlp, num_experts=8, k=2, rank=8, num_tasks=TASKS, adapt=places, seed=seed)
        layer.mlp = TaskFFN(experts)

    set_tasks(model, [0])
    change = (model(tokens).logits - before).abs().max().item()
    print(f"largest change of a logit by untrained experts: {change:.1e}")

    set_tasks(model, range(TASKS))
    both = tokens.repeat(TASKS, 1)
    wanted = torch.cat([(tokens + 1) % 64, (tokens - 1) % 64])  # the next letter, the one before
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _step in range(60):
        loss = torch.nn.functional.cross_entropy(model(both).logits.flatten(0, 1), wanted.flatten())
        (loss + router_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return {"change": change, "first": losses[0], "last": losses[-1]}


if __name__ == "__main__":
    main()
