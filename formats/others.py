"""Models that cannot be taken, and what to take instead: what a refusal tells."""

import re

TAKEN = "a Llama, a Qwen2 or 3, or a Mistral without a sliding window"
GPT2 = "GPT-2's architecture (learned positions, LayerNorm, GELU)"
GPT2_NAMES = re.compile(r"((openai-community|openai)/)?gpt2(-medium|-large|-xl)?")  # on the Hub
NEAREST = {  # by how model_type begins; the first that fits, the last one fits all
    "qwen": "Qwen/Qwen3-0.6B-Base",
    "mi": "mistralai/Mistral-7B-v0.3",  # mistral, ministral, mixtral
    "": "HuggingFaceTB/SmolLM2-135M",  # a Llama
}


def instead(model_type: object) -> str:
    """What to type for a model like one of this model_type."""
    kind = str(model_type)
    name = next(v for k, v in NEAREST.items() if kind.startswith(k))
    return f"what can be taken is {TAKEN}, such as --init_from=hf:{name}"


def gpt2_refusal(what: str) -> str:
    """Why GPT-2's or nanoGPT's model `what` is not taken, and what is."""
    return f"{what} has {GPT2}, which this Llama cannot hold; {instead('gpt2')}"
