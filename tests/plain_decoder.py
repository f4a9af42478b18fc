"""A routed Llama, Mistral, Qwen2 or Qwen3 in plain steps: the oracle of test_adaptive.py.

Written from the architectures' definitions; shares no code with qtale_lib or transformers, but reads weights
by name. `by_token` runs one sequence token by token and keeps keys only of executed tokens. `by_gates` runs
whole sequences with the gates as free, even fractional, inputs.
"""

import torch


class PlainDecoder:
    """Weights and shapes of a Hugging Face model, and the steps of its layers."""

    def __init__(self, model):
        self.config, self.weights = model.config, {n: p.detach() for n, p in model.named_parameters()}
        self.width = model.config.hidden_size
        self.heads, self.groups = self.config.num_attention_heads, self.config.num_key_value_heads
        self.head = getattr(self.config, "head_dim", None) or self.width // self.heads
        self.window = getattr(self.config, "sliding_window", None)

    def linear(self, name, x):
        y = x @ self.weights[f"model.{name}.weight"].T
        bias = self.weights.get(f"model.{name}.bias")
        return y if bias is None else y + bias

    def norm(self, name, x):
        scale = torch.sqrt((x * x).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x / scale * self.weights[f"model.{name}.weight"]

    def rotate(self, x, position):
        """Rotary embedding of [..., head] at a position (a number, or a tensor that broadcasts)."""
        half = self.head // 2
        theta = self.config.rope_parameters["rope_theta"]
        angle = position * theta ** (-torch.arange(half, dtype=x.dtype) * 2 / self.head)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def qkv(self, layer, x, position):
        """x [..., d] -> query [..., heads, head], key and value [..., groups, head]."""
        attention = f"layers.{layer}.self_attn"
        x = self.norm(f"layers.{layer}.input_layernorm", x)
        q, k, v = (self.linear(f"{attention}.{n}_proj", x).unflatten(-1, (-1, self.head)) for n in "qkv")
        if f"model.{attention}.q_norm.weight" in self.weights:
            q, k = self.norm(f"{attention}.q_norm", q), self.norm(f"{attention}.k_norm", k)
        return self.rotate(q, position), self.rotate(k, position), v

    def finish(self, layer, x, attended):
        """Output projection, both residuals and the feed-forward part. attended: [..., heads, head]."""
        x = x + self.linear(f"layers.{layer}.self_attn.o_proj", attended.flatten(-2))
        y = self.norm(f"layers.{layer}.post_attention_layernorm", x)
        gate = self.linear(f"layers.{layer}.mlp.gate_proj", y)
        up = self.linear(f"layers.{layer}.mlp.up_proj", y)
        return x + self.linear(f"layers.{layer}.mlp.down_proj", gate / (1 + torch.exp(-gate)) * up)

    def router(self, layer, x):
        name = f"layers.{layer}.router"
        y = self.linear(f"{name}.reduce", x)
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-5) * self.weights[f"model.{name}.norm.weight"]
        return self.linear(f"{name}.score", y / (1 + torch.exp(-y)))

    def unembed(self, x):
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self.norm("norm", x) @ head.T

    def by_token(self, ids, decide):
        """One sequence [T] -> (logits [T, V], executed [L, T]); decide(layer, token, its logits) -> bool."""
        layers = self.config.num_hidden_layers
        kept = [[] for _ in range(layers)]  # per layer: (token, key, value) of executed tokens
        logits, executed = [], torch.ones(layers, len(ids), dtype=torch.bool)
        for token, token_id in enumerate(ids.tolist()):
            x = self.weights["model.embed_tokens.weight"][token_id]
            for layer in range(layers):
                if f"model.layers.{layer}.router.reduce.weight" in self.weights:
                    executed[layer, token] = decide(layer, token, self.router(layer, x))
                if executed[layer, token]:
                    x = self._step(layer, token, x, kept[layer])
            logits.append(self.unembed(x))
        return torch.stack(logits), executed

    def _step(self, layer, token, x, kept):
        q, k, v = self.qkv(layer, x, token)
        kept.append((token, k, v))
        attended = []
        for head in range(self.heads):
            group = head * self.groups // self.heads
            seen = [(k, v) for at, k, v in kept if not self.window or at > token - self.window]
            scores = torch.stack([q[head] @ k[group] / self.head**0.5 for k, _ in seen])
            weights = torch.exp(scores - scores.max())
            values = torch.stack([v[group] for _, v in seen])
            attended.append(weights @ values / weights.sum())
        return self.finish(layer, x, torch.stack(attended))

    def by_gates(self, ids, gates):
        """Unpadded sequences [B, T] and gates [L, B, T] of any value -> logits [B, T, V]."""
        x = self.weights["model.embed_tokens.weight"][ids]
        length = ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        position = torch.arange(length, dtype=x.dtype)[:, None, None]
        for layer, gate in enumerate(gates):
            q, k, v = self.qkv(layer, x, position)
            k, v = (y.repeat_interleave(self.heads // self.groups, 2) for y in (k, v))
            weights = torch.exp(torch.einsum("bihd,bjhd->bhij", q, k) / self.head**0.5) * seen
            weights = weights * gate[:, None, None, :]
            attended = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)
            x = gate[..., None] * self.finish(layer, x, attended) + (1 - gate[..., None]) * x
        return self.unembed(x)
