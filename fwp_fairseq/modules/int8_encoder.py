"""An encoder by 8-bit integers, for translation on a processor (--decoding-weights int8).

Its linear layers multiply as those of the decoder do. fairseq's softmax attention has torch multiply by its weights,
past its layers, so here these are called, and torch does what is between them.
"""

from functools import partial
from typing import Any

from fairseq.modules import MultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from fwp_fairseq.modules.few_rows_linear import is_for_decoding, use_few_rows_linear

# Arguments of attention that are looked at; the others must not be given.
_TAKEN = ("key", "value", "key_padding_mask", "need_weights")


def use_int8_encoder(encoder: nn.Module) -> None:
    """Let the linear layers of ``encoder`` multiply integers. All modules stay what they are, by name and type."""
    use_few_rows_linear(encoder, int8=True)
    for attention in encoder.modules():
        if type(attention) is MultiheadAttention and "forward" not in vars(attention):
            attention.forward = partial(_forward, attention)


def _forward(attention: MultiheadAttention, query: Tensor, *rest: Any, **options: Any) -> Any:
    """As ``MultiheadAttention.forward`` for its arguments: of ``query``, (T, B, C), to itself, without weights."""
    others = [name for name, value in options.items() if name not in _TAKEN and not (value is None or value is False)]
    is_to_itself = options.get("key") is query and options.get("value") is query
    is_plain = is_to_itself and not (rest or others or options.get("need_weights", True)) and _is_plain(attention)
    if not (is_plain and is_for_decoding(query)):
        return type(attention).forward(attention, query, *rest, **options)
    tokens, sentences, _ = query.shape
    q, k, v = (
        layer(query).view(tokens, sentences, attention.num_heads, -1).permute(1, 2, 0, 3)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    padding = options.get("key_padding_mask")
    read = F.scaled_dot_product_attention(q, k, v, None if padding is None else ~padding.bool()[:, None, None])
    return attention.out_proj(read.permute(2, 0, 1, 3).flatten(2)), None


def _is_plain(attention: MultiheadAttention) -> bool:
    """Whether there is nothing between its layers but softmax attention."""
    return (
        attention.self_attention
        and not (attention.training or attention.dropout_module.apply_during_inference)
        and attention.qkv_same_dim
        and attention.bias_k is None
        and not (attention.add_zero_attn or attention.use_xformers or attention.onnx_trace or attention.beam_size > 1)
    )
