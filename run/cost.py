"""What a model costs: its parameters, and the operations of a token."""

from torch import nn

from model import GPT, num_parameters


def model_line(model: GPT) -> str:
    """What a model is, for people."""
    c = model.config
    return (
        f"model    {num_parameters(model):,} parameters, context {c.max_position_embeddings}, "
        f"vocab {c.vocab_size}"
    )


def flops_per_token(model: GPT) -> int:
    """Floating-point operations to train on one token, forward and backward.

    6 for each weight that a token is multiplied by (every nn.Linear, the head included, the
    embedding look-up not) and 12 L nh hd T for attention scores and values, the causal half not
    discounted: the convention of PaLM (arXiv 2204.02311, appendix B) and nanoGPT.
    """
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    c = model.config
    attention = c.num_hidden_layers * c.num_attention_heads * c.head_dim * c.max_position_embeddings
    return 6 * weights + 12 * attention
