"""The query module at full size: nine queries, 32 text tokens, 729 image tokens (3645 in HD), 32 heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, pad

from bench.case import Case, Goal, Inputs, Outputs, Provider, Size, Work, compiled, ours
from flashsloth_ops import EmbeddedQueryParams, ImageState, embedded_query_attention

REUSED = "state reused"
PLAIN = "plain PyTorch"
OFFICIAL = "official style"
SEPARATE = "separate plain calls"
COMPILED = "torch.compile"


def make_params(text: int, image: int, inner: int, generator: torch.Generator) -> EmbeddedQueryParams:
    """Random weights; norms near one, so that they matter."""
    widths = {"down_text": (inner, text), "down_image": (inner, image), "i2q_v": (image, image), "up": (text, image)}
    fields = {}
    for field in EmbeddedQueryParams._fields:
        module, kind = field.rsplit("_", 1)
        rows, columns = widths.get(module, (inner, inner))
        if kind == "bias":
            fields[field] = torch.randn(rows, generator=generator) * 0.1
        elif module.startswith("ln"):
            fields[field] = 1 + torch.randn(inner, generator=generator) * 0.1
        else:
            fields[field] = torch.randn(rows, columns, generator=generator) * columns**-0.5
    return EmbeddedQueryParams(**fields)


def inputs(size: Size) -> Inputs:
    generator = torch.Generator().manual_seed(size["tokens"])

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    questions = size["images"] * size["questions"]
    return {
        "query": randn(questions, size["queries"], size["text_dim"]),
        "text": randn(questions, size["text_tokens"], size["text_dim"]),
        "image": randn(size["images"], size["tokens"], size["image_dim"]),
        "params": make_params(size["text_dim"], size["image_dim"], size["inner"], generator),
        "heads": size["heads"],
    }


def work(size: Size) -> Work:
    """With the projections absorbed: image down-projection, scores, and the weighted sum of raw image tokens."""
    tokens, inner, wide = size["images"] * size["tokens"], size["inner"], size["image_dim"]
    rows = size["questions"] * size["queries"] * size["heads"]  # attention rows that read each image token
    flops = 2.0 * tokens * (wide * inner + rows * inner + rows * wide)
    weights = 2 * size["text_dim"] * inner + wide * inner + 5 * inner**2 + wide**2 + wide * size["text_dim"]
    return Work(flops, tokens * wide + weights)


def training_work(size: Size) -> Work:
    """Two more products for each, one a factor."""
    forward = work(size)
    return Work(3 * forward.flops, 3 * forward.elements)


def fused(given: Inputs) -> Outputs:
    out = embedded_query_attention(
        given["query"],
        given["text"],
        given["image"],
        given["params"],
        num_heads=given["heads"],
        image_state=given.get("state"),
    )
    assert isinstance(out, Tensor)
    return {"query": out}


def with_state(given: Inputs) -> Inputs:
    return {**given, "state": ImageState.from_image(given["image"], given["params"])}


def plain(given: Inputs) -> Outputs:
    """The module as one writes it: projections, norms, two attentions. Keys and values of an image are made once."""
    p, heads = given["params"], given["heads"]
    inner = p.down_text_bias.shape[0]
    scale = (inner // heads) ** -0.5
    questions = given["query"].shape[0] // given["image"].shape[0]

    q = _norm(linear(given["query"], p.down_text_weight, p.down_text_bias), p.ln_q_weight, p.ln_q_bias)
    t = _norm(linear(given["text"], p.down_text_weight, p.down_text_bias), p.ln_text_weight, p.ln_text_bias)
    q = _heads(linear(q, p.t2q_q_weight, p.t2q_q_bias), heads)
    k = _heads(linear(t, p.t2q_k_weight, p.t2q_k_bias), heads)
    v = _heads(linear(t, p.t2q_v_weight, p.t2q_v_bias), heads)
    told = _merge(((q @ k.mT) * scale).softmax(-1) @ v)

    image = linear(given["image"], p.down_image_weight, p.down_image_bias)
    k = _heads(linear(_norm(image, p.ln_kv_weight, p.ln_kv_bias), p.i2q_k_weight, p.i2q_k_bias), heads)
    v = _heads(linear(given["image"], p.i2q_v_weight, p.i2q_v_bias), heads)
    # Questions on one image are more rows of the same attention, so nothing is repeated.
    rows = linear(told, p.i2q_q_weight, p.i2q_q_bias).view(given["image"].shape[0], -1, inner)
    seen = _merge(((_heads(rows, heads) @ k.mT) * scale).softmax(-1) @ v)
    seen = seen.view(seen.shape[0] * questions, -1, seen.shape[-1])
    return {"query": given["query"] + linear(seen, p.up_weight, p.up_bias)}


def separate(given: Inputs) -> Outputs:
    """One plain call a question, as with a module that knows one question an image."""
    questions = given["query"].shape[0] // given["image"].shape[0]
    found = []
    for row in range(given["query"].shape[0]):
        image = given["image"][row // questions, None]
        one = {**given, "query": given["query"][row, None], "text": given["text"][row, None], "image": image}
        found.append(plain(one)["query"])
    return {"query": torch.cat(found)}


def official(given: Inputs) -> Outputs:
    """Texts padded and images stacked in a loop over samples, a mask that is added, logits and softmax in fp32."""
    p, heads = given["params"], given["heads"]
    batch, longest = given["text"].shape[:2]
    questions = batch // given["image"].shape[0]
    texts, masks, images = [], [], []
    for row in range(batch):
        text = given["text"][row]
        texts.append(pad(text, (0, 0, 0, longest - text.shape[0])))
        masks.append(pad(text.new_ones(text.shape[0]), (0, longest - text.shape[0])))
        images.append(given["image"][row // questions])
    text, mask, image = torch.stack(texts), torch.stack(masks), torch.stack(images)

    q = linear(given["query"], p.down_text_weight, p.down_text_bias)
    t = linear(text, p.down_text_weight, p.down_text_bias)
    y = linear(image, p.down_image_weight, p.down_image_bias)
    q, t = _norm(q, p.ln_q_weight, p.ln_q_bias), _norm(t, p.ln_text_weight, p.ln_text_bias)
    y = _norm(y, p.ln_kv_weight, p.ln_kv_bias)
    bias = mask.masked_fill(mask == 0, -1e4)[:, None, None, :]
    told = _official_attention(
        linear(q, p.t2q_q_weight, p.t2q_q_bias),
        linear(t, p.t2q_k_weight, p.t2q_k_bias),
        linear(t, p.t2q_v_weight, p.t2q_v_bias),
        heads,
        bias,
    )
    seen = _official_attention(
        linear(told, p.i2q_q_weight, p.i2q_q_bias),
        linear(y, p.i2q_k_weight, p.i2q_k_bias),
        linear(image, p.i2q_v_weight, p.i2q_v_bias),
        heads,
        None,
    )
    return {"query": given["query"] + linear(seen, p.up_weight, p.up_bias)}


def _official_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = _heads(q, heads), _heads(k, heads), _heads(v, heads)
    logits = torch.matmul(q.to(wide), k.to(wide).transpose(2, 3)) / q.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias
    return _merge(torch.matmul(torch.softmax(logits, dim=-1, dtype=wide).to(v.dtype), v))


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, (x.shape[-1],), weight, bias)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


FULL = {"queries": 9, "text_tokens": 32, "text_dim": 2560, "image_dim": 1152, "inner": 576, "heads": 32}
SMALL = {"queries": 3, "text_tokens": 5, "text_dim": 48, "image_dim": 64, "inner": 32, "heads": 4}
SMALL |= {"images": 2, "questions": 1, "tokens": 50}


def _case(
    name: str,
    title: str,
    sizes: tuple[dict[str, int], ...],
    goals: tuple[Goal, ...],
    peers: tuple[Provider, ...],
    **rest: Any,
) -> Case:
    reference = "axis" not in rest
    own = (*ours(fused, reference=reference), *ours(fused, REUSED, with_state, reference=reference))
    rest = {"small": SMALL, "mode": "forward", "providers": (*own, *peers), "work": work, **rest}
    return Case(
        name=f"embedded_query/{name}",
        op="embedded_query",
        title=title,
        sizes=tuple(FULL | size for size in sizes),
        inputs=inputs,
        exact=plain,
        plain=PLAIN,
        goals=goals,
        **rest,
    )


def _size(images: int, questions: int, tokens: int) -> dict[str, int]:
    return {"images": images, "questions": questions, "tokens": tokens}


# Every weight but the biases that move no softmax: their exact gradient is zero.
LEARNT = tuple(
    f"params.{name}" for name in EmbeddedQueryParams._fields if name not in ("ln_kv_bias", "i2q_k_bias", "t2q_k_bias")
)

PEERS = (Provider(PLAIN, plain), Provider(OFFICIAL, official), compiled(plain))
CPU_GOALS = (Goal("cpu", "speedup", 1.7, (PLAIN,)), Goal("cpu", "speedup", 3.0, (PLAIN,), variant=REUSED))

CASES = (
    _case(
        "b1",
        "query module, 729 image tokens, one question",
        (_size(1, 1, 729),),
        (
            Goal("cuda", "seconds", 30e-6),
            Goal("cuda", "speedup", 10.0, (PLAIN,)),
            Goal("cuda", "speedup", 3.0, (COMPILED,)),
        ),
        PEERS,
    ),
    _case("b8", "query module, 729 image tokens, 8 images", (_size(8, 1, 729),), CPU_GOALS, PEERS),
    _case("b8-hd", "query module, 3645 image tokens, 8 images", (_size(8, 1, 3645),), CPU_GOALS, PEERS),
    _case(
        "b64",
        "query module, 729 image tokens, 64 images",
        (_size(64, 1, 729),),
        (Goal("cuda", "speedup", 1.7, (PLAIN, COMPILED)),),
        PEERS,
        devices=("cuda",),
    ),
    _case(
        "training-b8",
        "query module, 729 image tokens, 8 images, forward and backward",
        (_size(8, 1, 729),),
        (),
        (),
        mode="forward+backward",
        work=training_work,
        providers=(*ours(fused), *PEERS),
        differentiable=("query", "text", "image", *LEARNT),
    ),
    _case(
        "four-questions",
        "query module, four questions on one image",
        (_size(1, 4, 729),),
        (Goal("cpu", "speedup", 3.0, (SEPARATE,)),),
        (Provider(PLAIN, plain), Provider(SEPARATE, separate)),
        small=SMALL | {"questions": 4},
    ),
    _case(
        "tokens",
        "query module by image tokens",
        tuple(_size(1, 1, tokens) for tokens in (81, 243, 729, 2187, 6561, 16384, 32768)),
        (),
        (Provider(PLAIN, plain),),
        axis="tokens",
    ),
    _case(
        "questions",
        "query module by questions on one image",
        tuple(_size(1, questions, 729) for questions in (1, 2, 4, 8, 16, 32)),
        (),
        (Provider(PLAIN, plain),),
        axis="questions",
    ),
)
