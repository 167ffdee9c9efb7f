"""A training step of the whole model, forward and backward: memory and time of the fused ops against plain PyTorch.

The second stage of the recipe: the vision tower runs without gradients, all else learns. Rows are of one length, so
that nothing is won by leaving out padding, and dropout is off, so that all paths have one loss: the check compares it,
and the gradient of every weight, before anything is timed. The optimizer is not part of it: it is the same for all.

A CPU gets a small model with the heads of the real one (72 and 80 wide), a GPU the real widths with few layers.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import Case, Inputs, Outputs, Provider, Size, Work, ours
from bench.cases import embedded_query, spatial_pool

PLAIN = "plain PyTorch"
QUERIES, WINDOW, PATCH = 9, 3, 2
IMAGE, QUERY, OFFSET, WORDS = 0, 1, 2, 3  # ids; words begin at the last
_PARTS = {
    "pooling and projector": ("dpooling", "dprojector"),
    "queries": ("dlearnable_tokens", "dembedded_query"),
    "decoder": ("dlanguage_model",),
}
# Weights that move no softmax: their exact gradient is zero.
_STILL = ("pooling.mlp.3.bias", "ln_kv.bias", "i2q_attn.k_proj.bias", "t2q_attn.k_proj.bias")


def config_of(size: Size) -> Any:
    """The model's configuration at a size."""
    from flashsloth.config import FlashSlothConfig

    image, text = size["image_dim"], size["text_dim"]
    vision = {
        "hidden_size": image,
        "intermediate_size": image * 4304 // 1152,
        "num_hidden_layers": size["tower_layers"] + 1,  # the last is not used
        "num_attention_heads": size["image_heads"],
        "image_size": size["side"] * PATCH,
        "patch_size": PATCH,
    }
    decoder = {
        "model_type": "phi",
        "hidden_size": text,
        "intermediate_size": 4 * text,
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "partial_rotary_factor": 0.4,
        "vocab_size": size["vocabulary"],
    }
    return FlashSlothConfig(
        vision_config=vision,
        text_config=decoder,
        pool_window=WINDOW,
        num_queries=QUERIES,
        query_layer=size["layers"] // 2,
        query_dim=size["inner"],
        image_token_id=IMAGE,
        learnable_token_id=QUERY,
        query_offset_token_id=OFFSET,
        eos_token_id=None,
        pad_token_id=None,
    )


def inputs(size: Size) -> Inputs:
    """Weights by their names, with slashes for dots; pictures and ids: each row a picture, a question, an answer."""
    config = config_of(size)
    generator = torch.Generator().manual_seed(size["batch"])
    batch, side = size["batch"], config.vision_config.image_size
    words = torch.randint(WORDS, size["vocabulary"], (batch, size["question"] + size["answer"]), generator=generator)
    parts = [
        torch.full((batch, config.num_visual_tokens), IMAGE),
        words[:, : size["question"]],
        torch.full((batch, QUERIES), QUERY),
        words[:, size["question"] :],
    ]
    weights = {_key(name): weight.detach() for name, weight in _drawn(config).named_parameters()}
    pixels = torch.rand(batch, 1, 3, side, side, generator=generator) * 2 - 1
    return {**weights, "pixel_values": pixels, "input_ids": torch.cat(parts, dim=1), "size": dict(size)}


def _drawn(config: Any) -> nn.Module:
    """Weights as training starts, but those of the query module so wide that what it reads matters. Not wider: where a
    rounding on the way is magnified, the errors of two right paths differ by more than a factor of two, by chance."""
    from flashsloth.modeling import FlashSlothForConditionalGeneration

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = FlashSlothForConditionalGeneration(config)
        for weight in model.embedded_query.parameters():
            if weight.dim() == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
    return model


def fused(given: Inputs) -> Outputs:
    """The model as it is trained."""
    return _loss(given, "flashsloth")


def plain(given: Inputs) -> Outputs:
    """The same with SDPA, pooling by one MLP call over all tokens, and the query module written out."""
    return _loss(given, "sdpa")


def _loss(given: Inputs, attention: str) -> Outputs:
    size, ids = given["size"], given["input_ids"]
    model = _model(tuple(size.items()), attention, ids.device.type)
    weights = {name.replace("/", "."): value for name, value in given.items() if "/" in name}
    visual = ids.shape[1] - size["question"] - QUERIES - size["answer"]
    asked = torch.tensor([visual, visual + size["question"]]).repeat(ids.shape[0], 1, 1)
    labels = torch.full_like(ids, -100)
    labels[:, -size["answer"] :] = ids[:, -size["answer"] :]
    known = {"input_ids": ids, "pixel_values": given["pixel_values"], "question_spans": asked, "labels": labels}
    out = torch.func.functional_call(model, weights, (), {**known, "use_cache": False})
    return {"loss": out.loss}


@lru_cache(maxsize=4)
def _model(size: tuple[tuple[str, int], ...], attention: str, device: str) -> Any:
    """The modules without weights, which come with each call."""
    from flashsloth.modeling import FlashSlothForConditionalGeneration

    with torch.random.fork_rng(), torch.device(device):
        model = FlashSlothForConditionalGeneration(config_of(dict(size)))
    model.set_attn_implementation(attention)
    if attention == "sdpa":
        _write_out(model)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    return model.eval()


def _write_out(model: Any) -> None:
    """Put the plain peers of the cases of the ops in place of the ops."""
    pooling, query = model.pooling, model.embedded_query

    def pool(features: Tensor) -> Tensor:
        hidden, score = pooling.mlp["0"], pooling.mlp["3"]
        weights = {"w1": hidden.weight, "b1": hidden.bias, "w2": score.weight, "b2": score.bias}
        return spatial_pool.scores_windowed(
            {"x": features, **weights, "side": pooling.grid[0], "window": pooling.window}
        )["y"]

    def read(asking: Tensor, text: Tensor, lengths: Tensor, image: Tensor, state: Any = None) -> Tensor:
        given = {"query": asking, "text": text, "image": image, "params": query.params(), "heads": query.num_heads}
        return embedded_query.plain(given)["query"]

    pooling.forward, query.forward = pool, read


def work(size: Size) -> Work:
    """Three products a matrix that learns, two where nothing before it does, one in the tower; weights and gradients
    pass once each."""
    batch, tokens = size["batch"], size["side"] ** 2
    image, text, inner, layers = size["image_dim"], size["text_dim"], size["inner"], size["layers"]
    visual = (-(-size["side"] // WINDOW)) ** 2
    length = visual + size["question"] + QUERIES + size["answer"]
    tower = size["tower_layers"] * (4 * image**2 + 2 * image * (image * 4304 // 1152))
    decoder = layers * 12 * text**2 + size["vocabulary"] * text
    reading = QUERIES * (4 * inner**2 + image * (image + text)) + QUERIES * size["heads"] * tokens * (inner + image)
    flops = batch * tokens * (2 * tower + 4 * size["tower_layers"] * image * tokens)
    flops += batch * tokens * 4 * (image**2 + image * inner)
    flops += batch * visual * 6 * (image * text + text**2)
    flops += batch * 6 * (reading + (QUERIES + size["question"]) * text * inner)
    flops += batch * length * (6 * decoder + 12 * layers * text * length)
    learned = decoder + 2 * image**2 + image * text + text**2 + inner * (2 * text + image) + image * text
    return Work(float(flops), float(tower + 2 * learned))


def learned(layers: int) -> tuple[str, ...]:
    """Names of the weights that learn and whose gradient is not zero. They are known without building the model, as
    cases are declared before anything is imported for them."""
    both = ("weight", "bias")
    block = [f"self_attn.{one}" for one in ("q_proj", "k_proj", "v_proj", "dense")]
    block += ["mlp.fc1", "mlp.fc2", "input_layernorm"]
    query = ["down_projector_learnable_text", "down_projector_image", "up_projector"]
    query += [f"layers.0.{part}_attn.{one}_proj" for part in ("t2q", "i2q") for one in "qkv"]
    query += [f"layers.0.ln_{one}" for one in ("text", "q", "kv")]
    modules = [
        *("pooling.mlp.0", "pooling.mlp.3", "projector.0", "projector.2"),
        *(f"embedded_query.{one}" for one in query),
        *(f"language_model.model.layers.{layer}.{one}" for layer in range(layers) for one in block),
        *("language_model.model.final_layernorm", "language_model.lm_head"),
    ]
    names = ["learnable_tokens.token", "language_model.model.embed_tokens.weight"]
    names += [f"{module}.{kind}" for module in modules for kind in both]
    return tuple(_key(name) for name in names if not name.endswith(_STILL))


def by_part(outputs: Outputs, given: Inputs) -> Outputs:
    """The loss, and the gradients of each part end to end. In bf16 the tiny gradient of a norm is off by a tenth of it
    on every path, so there gradients are held to the largest of their part."""
    found = {"loss": outputs["loss"]}
    for part, modules in _PARTS.items():
        gradients = [value.flatten() for name, value in outputs.items() if name.split("/")[0] in modules]
        found[f"gradients of {part}"] = torch.cat(gradients)
    return found


def _key(name: str) -> str:
    return name.replace(".", "/")  # a dot would be a field of a named tuple


def _case(name: str, title: str, device: str, layers: int, size: Size, small: Size) -> Case:
    return Case(
        name=f"train/{name}",
        op="train",
        title=title,
        mode="forward+backward",
        sizes=({**size, "layers": layers},),
        small={**small, "layers": layers},
        inputs=inputs,
        work=work,
        providers=(*ours(fused), Provider(PLAIN, plain)),
        exact=plain,
        plain=PLAIN,
        devices=(device,),
        differentiable=learned(layers),
        compared=by_part if device == "cuda" else None,
    )


SMALL = {"batch": 2, "side": 6, "image_dim": 32, "image_heads": 2, "tower_layers": 1, "text_dim": 48, "heads": 4}
SMALL |= {"inner": 16, "vocabulary": 40, "question": 5, "answer": 4}
CPU = {"batch": 4, "side": 27, "image_dim": 144, "image_heads": 2, "tower_layers": 2, "text_dim": 320, "heads": 4}
CPU |= {"inner": 72, "vocabulary": 512, "question": 24, "answer": 24}
GPU = {"batch": 8, "side": 27, "image_dim": 1152, "image_heads": 16, "tower_layers": 4, "text_dim": 2560, "heads": 32}
GPU |= {"inner": 576, "vocabulary": 8192, "question": 32, "answer": 64}

CASES = (
    (
        _case("step-small", "a training step, small model", "cpu", 3, CPU, SMALL),
        _case("step", "a training step, real widths, four decoder layers", "cuda", 4, GPU, SMALL),
    )
    if find_spec("transformers") is not None
    else ()
)
