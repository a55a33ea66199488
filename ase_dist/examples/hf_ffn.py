"""A Hugging Face model, whose FFN names its parts otherwise, with experts. Needs ``pip install transformers``."""

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ase_dist.moe import FFN, MoEFFN, TaskFFN, router_loss, set_tasks

TASKS = 2


def main() -> dict[str, float]:
    """The change of the logits by the experts alone, and the loss of two tasks before and after training."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    model = GPTNeoXForCausalLM(config).requires_grad_(False)  # or GPTNeoXForCausalLM.from_pretrained(...)
    tokens = torch.randint(64, (8, 16))
    before = model(tokens).logits

    for seed, layer in enumerate(model.gpt_neox.layers):
        ffn = FFN(layer.mlp.dense_h_to_4h, layer.mlp.act, layer.mlp.dense_4h_to_h)  # fc1, act and fc2 of this model
        layer.mlp = TaskFFN(MoEFFN(ffn, num_experts=8, k=2, rank=8, num_tasks=TASKS, seed=seed))

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
