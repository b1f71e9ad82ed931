"""Where the attention and FFN Linears are in each supported model family.

Support for another family is one more entry of `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Family:
    """Where the parts of a layer are, as attribute paths relative to the layer module."""

    name: str
    layers: tuple[str, ...]  # class names of the layer modules
    attention: str  # the module that knows the size of a head
    head_dim: str  # its attribute with that size
    q: str
    k: str
    v: str
    o: str
    fc_in: tuple[str, ...]
    fc_out: str
    heads: str | None = None  # attribute of `attention` with the number of heads, if forward or tools read one
    width: str | None = None  # the same for heads * head_dim
    bias_table: str | None = None  # parameter of `attention` with one column per head


_BERT = Family(
    name="bert",
    layers=("BertLayer",),
    attention="attention.self",
    head_dim="attention_head_size",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    fc_in=("intermediate.dense",),
    fc_out="output.dense",
    heads="num_attention_heads",
    width="all_head_size",
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _BERT,
        replace(_BERT, name="roberta", layers=("RobertaLayer", "XLMRobertaLayer", "CamembertLayer")),
        replace(_BERT, name="swin", layers=("SwinLayer",), bias_table="relative_position_bias_table"),
        replace(
            _BERT,
            name="vit",
            layers=("ViTLayer", "DeiTLayer"),
            attention="attention.attention",
            q="attention.attention.query",
            k="attention.attention.key",
            v="attention.attention.value",
        ),
        Family(
            name="distilbert",
            layers=("TransformerBlock",),
            attention="attention",
            head_dim="attention_head_size",
            q="attention.q_lin",
            k="attention.k_lin",
            v="attention.v_lin",
            o="attention.out_lin",
            fc_in=("ffn.lin1",),
            fc_out="ffn.lin2",
            heads="n_heads",
            width="dim",
        ),
        Family(
            name="wav2vec2",
            layers=(
                "Wav2Vec2EncoderLayer",
                "Wav2Vec2EncoderLayerStableLayerNorm",
                "HubertEncoderLayer",
                "HubertEncoderLayerStableLayerNorm",
            ),
            attention="attention",
            head_dim="head_dim",
            q="attention.q_proj",
            k="attention.k_proj",
            v="attention.v_proj",
            o="attention.out_proj",
            fc_in=("feed_forward.intermediate_dense",),
            fc_out="feed_forward.output_dense",
            heads="num_heads",
        ),
        Family(
            name="opt",
            layers=("OPTDecoderLayer",),
            attention="self_attn",
            head_dim="head_dim",
            q="self_attn.q_proj",
            k="self_attn.k_proj",
            v="self_attn.v_proj",
            o="self_attn.out_proj",
            fc_in=("fc1",),
            fc_out="fc2",
            heads="num_heads",
        ),
        Family(  # q heads per kv head stay as they are, so no attribute changes
            name="llama",
            layers=("LlamaDecoderLayer",),
            attention="self_attn",
            head_dim="head_dim",
            q="self_attn.q_proj",
            k="self_attn.k_proj",
            v="self_attn.v_proj",
            o="self_attn.o_proj",
            fc_in=("mlp.gate_proj", "mlp.up_proj"),
            fc_out="mlp.down_proj",
        ),
    )
}
