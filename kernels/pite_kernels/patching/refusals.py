"""What `patch` refuses: models whose loss or attention would silently differ from their own code.

Each refusal is one sentence with the config's field. What only a call shows is checked in attention.py and loss.py.
"""

from __future__ import annotations

import dis
import inspect
from importlib import import_module
from typing import Any

from torch import nn

LOSS_ONLY = "; patch the loss only: patch(model, attention=False)"
ATTENTION_ONLY = "; patch the attention only: patch(model, loss=False)"

_IMAGES = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")


def text_model(model: Any) -> Any:
    """The inner model that holds the decoder's layers."""
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"patch: {type(model).__name__} has is_encoder_decoder, but patch is for decoders that read one sequence"
        )
    text = model.get_decoder()
    while text.get_decoder() is not text:
        text = text.get_decoder()
    return text


def check_loss(model: Any) -> None:
    """Raise ValueError unless the loss is the cross-entropy of a plain linear head."""
    name, config = type(model).__name__, model.config.get_text_config()
    check_head(model)
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_logit_soft_cap"):
        if getattr(config, field, None) not in (None, 1, 1.0):
            raise ValueError(f"patch: {field} is {getattr(config, field)}, and the fused loss has none{ATTENTION_ONLY}")
    own = import_module("transformers.loss.loss_utils").ForCausalLMLoss
    if model.loss_function is not own or "loss_function" not in _globals_of(model):
        raise ValueError(f"patch: {name} has a loss of its own (loss_type {model.loss_type}){ATTENTION_ONLY}")


def check_head(model: Any) -> None:
    """Raise ValueError unless the head is a plain linear layer; a LoRA may have replaced it since `patch`."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        kind = f"{type(head).__name__} of {type(head).__module__.partition('.')[0]}"
        raise ValueError(f"patch: the head of {type(model).__name__} is {kind}, not torch.nn.Linear{ATTENTION_ONLY}")


def check_boundaries(text: Any, call: dict[str, Any]) -> None:
    """Raise ValueError for document boundaries that the model's own attention does not read."""
    own = text.config._attn_implementation
    if call.get("cu_seq_lens_q") is not None and own in ("eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"patch: the model's own attention ({own}) does not read cu_seq_lens_q, so documents would attend to each other; "
            "patch the attention too, or pass padded rows"
        )


def check_attention(model: Any, text: Any) -> None:
    """Raise ValueError unless causal attention within documents is all that the text model's layers compute."""
    name, config = type(text).__name__, text.config
    if text is model:
        raise ValueError(f"patch: {name} has no inner text model{LOSS_ONLY}")
    if not text._can_set_attn_implementation():
        raise ValueError(f"patch: {name} has no exchangeable attention (AttentionInterface){LOSS_ONLY}")
    missing = {"attention_mask", "position_ids", "inputs_embeds"} - set(
        inspect.signature(type(text).forward).parameters
    )
    if missing:
        raise ValueError(f"patch: {name}.forward has no {' and no '.join(sorted(missing))}{LOSS_ONLY}")
    for field in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_logit_softcapping",
                  "cross_attention_layers", "add_cross_attention", "use_bidirectional_attention", "attention_chunk_size",
                  "output_router_logits", "output_attentions", "layerdrop"):  # fmt: skip
        if getattr(config, field, None):
            raise ValueError(
                f"patch: {field} is {getattr(config, field)} in the config of {name}, which packed attention does not "
                f"support{LOSS_ONLY}"
            )
    if getattr(config, "is_causal", True) is False:
        raise ValueError(f"patch: is_causal is False in the config of {name}{LOSS_ONLY}")
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise ValueError(f"patch: layer_types has {', '.join(sorted(others))}{LOSS_ONLY}")
    offset = next((type(m).__name__ for m in text.modules() if hasattr(m, "create_position_ids_from_input_ids")), None)
    if offset:
        raise ValueError(f"patch: {offset} derives positions from input_ids, so they do not start at 0{LOSS_ONLY}")
    sinks = next((n for n, _ in text.named_parameters() if n.endswith("sinks")), None)
    if sinks:
        raise ValueError(f"patch: {name} has attention sinks ({sinks}){LOSS_ONLY}")
    for module in _around(model, text):
        builds = next((n for n in _globals_of(module) if n.startswith("create_") and "mask" in n), None)
        if builds:
            raise ValueError(
                f"patch: {type(module).__name__} makes attention masks of its own ({builds}), as for images that "
                f"attend in both directions{LOSS_ONLY}"
            )
    _check_layers(text)


def _check_layers(text: Any) -> None:
    """Raise ValueError unless the document boundaries reach packed attention, with heads and masks that it can compute."""
    name, config = type(text).__name__, text.config
    width = getattr(config, "qk_head_dim", None)
    if width is not None and getattr(config, "v_head_dim", width) != width:
        raise ValueError(f"patch: the values of {name} are {config.v_head_dim} wide and its queries {width}{LOSS_ONLY}")
    attention = {id(m): m for m in text.modules() if "ALL_ATTENTION_FUNCTIONS" in _globals_of(m)}
    if len(attention) < config.num_hidden_layers:
        raise ValueError(
            f"patch: {len(attention)} of the {config.num_hidden_layers} layers of {name} have exchangeable attention{LOSS_ONLY}"
        )
    for module in attention.values():
        if masks := next((n for n in _globals_of(module) if "mask" in n), None):
            raise ValueError(f"patch: {type(module).__name__} makes attention masks of its own ({masks}){LOSS_ONLY}")
    for module in text.modules():
        inside = id(module) in attention or any(id(m) in attention for m in module.modules())
        if inside and _has_forward(module) and not _passes_keywords(module):
            raise ValueError(
                f"patch: {type(module).__name__} does not pass cu_seq_lens_q on to the attention inside it{LOSS_ONLY}"
            )


def text_configs(model: Any, text: Any) -> list[Any]:
    """The configs that the text model's layers read their attention from."""
    inside = {id(m): m for m in text.modules()}
    configs = {id(c): c for m in inside.values() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    around = {id(m) for m in _around(model, text)}
    for module in model.modules():
        if id(module) not in inside and id(module) not in around and id(getattr(module, "config", None)) in configs:
            raise ValueError(
                f"patch: {type(module).__name__} shares its config with {type(text).__name__}, so the attention of one "
                f"cannot be set without the other's{LOSS_ONLY}"
            )
    return list(configs.values())


def window(text: Any) -> tuple[str, int | None]:
    """The sliding window of the text model's layers: the config's field, and its value or None."""
    config = text.config
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return f"sliding_window of {type(config).__name__}", getattr(config, "sliding_window", None) if slides else None


def check_positions(model: Any, call: dict[str, Any]) -> None:
    """Raise ValueError if the caller's positions would replace the coordinates that a model gives to images."""
    positions = call.get("position_ids")
    if positions is None or positions.dim() != 2 or not hasattr(model.base_model, "get_rope_index"):
        return
    if any(call.get(name) is not None for name in _IMAGES):
        raise ValueError(
            f"patch: position_ids {tuple(positions.shape)} would replace the coordinates of images that "
            f"{type(model).__name__} computes; leave position_ids out and pass cu_seq_lens_q and max_length_q"
        )


def check_adjacent_media(model: Any, call: dict[str, Any]) -> None:
    """Raise ValueError for images or videos without a token between them: M-RoPE takes their tokens for those of one."""
    types = call.get("mm_token_type_ids")
    if types is None or call.get("position_ids") is not None or not hasattr(model.base_model, "get_rope_index"):
        return
    for kind, number, grids in (("images", 1, "image_grid_thw"), ("videos", 2, "video_grid_thw")):
        if call.get(grids) is None:
            continue
        of_kind = types == number
        runs = int(of_kind[:, :1].sum() + (of_kind[:, 1:] & ~of_kind[:, :-1]).sum())
        if runs < len(call[grids]):
            raise ValueError(
                f"patch: no token separates some of the {len(call[grids])} {kind}, so {type(model).__name__} cannot "
                "place them; put a token of text between two of them, also where two documents meet"
            )


def check_labels(call: dict[str, Any]) -> None:
    """Raise ValueError where transformers' Trainer has taken the labels away to compute the loss itself."""
    if call.get("labels") is None and call.get("num_items_in_batch") is not None:
        raise ValueError(
            "patch: num_items_in_batch came without labels, as from a Trainer with label_smoothing_factor or "
            "compute_loss_func, which would not use the fused loss; use patch(model, label_smoothing=...) instead, or "
            "patch(model, loss=False)"
        )


def _around(model: Any, text: Any) -> list[Any]:
    """The modules that contain the text model."""
    return [m for m in model.modules() if m is not text and any(part is text for part in m.modules())]


def _has_forward(module: Any) -> bool:
    """Not so a list of modules."""
    return type(module).forward is not nn.Module.forward


def _passes_keywords(module: Any) -> bool:
    """Whether the module's forward calls something with `**kwargs`."""
    return any(i.opname == "CALL_FUNCTION_EX" for i in dis.get_instructions(inspect.unwrap(type(module).forward)))


def _globals_of(module: Any) -> tuple[str, ...]:
    """Names that the module's forward reads: globals and attributes."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_names if code else ()
