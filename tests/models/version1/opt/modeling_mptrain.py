"""OPTForCausalLM with fewer heads and FFN channels than config.json says, written by mptrain.

Used by AutoModel….from_pretrained(FOLDER, trust_remote_code=True). A pruned model needs torch
and transformers only; a quantized one needs mptrain as well.
"""

import os

from torch import nn
from transformers import OPTForCausalLM as Base

WEIGHTS = "mptrain.safetensors"
QUANTIZED = False
FAMILIES = [{'name': 'bert', 'layers': ('BertLayer',), 'attention': 'attention.self', 'head_dim': 'attention_head_size', 'q': 'attention.self.query', 'k': 'attention.self.key', 'v': 'attention.self.value', 'o': 'attention.output.dense', 'fc_in': ('intermediate.dense',), 'fc_out': 'output.dense', 'heads': 'num_attention_heads', 'width': 'all_head_size', 'bias_table': None}, {'name': 'roberta', 'layers': ('RobertaLayer', 'XLMRobertaLayer', 'CamembertLayer'), 'attention': 'attention.self', 'head_dim': 'attention_head_size', 'q': 'attention.self.query', 'k': 'attention.self.key', 'v': 'attention.self.value', 'o': 'attention.output.dense', 'fc_in': ('intermediate.dense',), 'fc_out': 'output.dense', 'heads': 'num_attention_heads', 'width': 'all_head_size', 'bias_table': None}, {'name': 'swin', 'layers': ('SwinLayer',), 'attention': 'attention.self', 'head_dim': 'attention_head_size', 'q': 'attention.self.query', 'k': 'attention.self.key', 'v': 'attention.self.value', 'o': 'attention.output.dense', 'fc_in': ('intermediate.dense',), 'fc_out': 'output.dense', 'heads': 'num_attention_heads', 'width': 'all_head_size', 'bias_table': 'relative_position_bias_table'}, {'name': 'vit', 'layers': ('ViTLayer', 'DeiTLayer'), 'attention': 'attention.attention', 'head_dim': 'attention_head_size', 'q': 'attention.attention.query', 'k': 'attention.attention.key', 'v': 'attention.attention.value', 'o': 'attention.output.dense', 'fc_in': ('intermediate.dense',), 'fc_out': 'output.dense', 'heads': 'num_attention_heads', 'width': 'all_head_size', 'bias_table': None}, {'name': 'distilbert', 'layers': ('TransformerBlock',), 'attention': 'attention', 'head_dim': 'attention_head_size', 'q': 'attention.q_lin', 'k': 'attention.k_lin', 'v': 'attention.v_lin', 'o': 'attention.out_lin', 'fc_in': ('ffn.lin1',), 'fc_out': 'ffn.lin2', 'heads': 'n_heads', 'width': 'dim', 'bias_table': None}, {'name': 'wav2vec2', 'layers': ('Wav2Vec2EncoderLayer', 'Wav2Vec2EncoderLayerStableLayerNorm', 'HubertEncoderLayer', 'HubertEncoderLayerStableLayerNorm'), 'attention': 'attention', 'head_dim': 'head_dim', 'q': 'attention.q_proj', 'k': 'attention.k_proj', 'v': 'attention.v_proj', 'o': 'attention.out_proj', 'fc_in': ('feed_forward.intermediate_dense',), 'fc_out': 'feed_forward.output_dense', 'heads': 'num_heads', 'width': None, 'bias_table': None}, {'name': 'opt', 'layers': ('OPTDecoderLayer',), 'attention': 'self_attn', 'head_dim': 'head_dim', 'q': 'self_attn.q_proj', 'k': 'self_attn.k_proj', 'v': 'self_attn.v_proj', 'o': 'self_attn.out_proj', 'fc_in': ('fc1',), 'fc_out': 'fc2', 'heads': 'num_heads', 'width': None, 'bias_table': None}, {'name': 'llama', 'layers': ('LlamaDecoderLayer',), 'attention': 'self_attn', 'head_dim': 'head_dim', 'q': 'self_attn.q_proj', 'k': 'self_attn.k_proj', 'v': 'self_attn.v_proj', 'o': 'self_attn.o_proj', 'fc_in': ('mlp.gate_proj', 'mlp.up_proj'), 'fc_out': 'mlp.down_proj', 'heads': None, 'width': None, 'bias_table': None}]


class ShrunkOPTForCausalLM(Base):
    mptrain_base = Base

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        layers = getattr(config, "mptrain_structure", {}).get("layers", {})
        for index, (layer, family) in enumerate(_layers(self) if layers else []):
            _shrink(layer, family, layers[str(index)])

    @classmethod
    def from_pretrained(cls, name, *args, config=None, output_loading_info=False, **kwargs):
        """As in transformers, but a missing or ill-shaped weight is an error."""
        if QUANTIZED:
            return _load_quantized(name)
        config = cls.config_class.from_pretrained(name) if config is None else config
        config.transformers_weights = WEIGHTS
        model, info = super().from_pretrained(name, *args, config=config, output_loading_info=True, **kwargs)
        bad = {kind: keys for kind, keys in info.items() if keys}
        if bad:
            raise RuntimeError(f"{name}: the weights do not fit the model: {bad}")
        del model.config.transformers_weights
        return (model, info) if output_loading_info else model


def _load_quantized(name):
    try:
        import mptrain
    except ImportError:
        raise ImportError(f"{name} is quantized: pip install 'mptrain[openvino]' to load it") from None
    if not os.path.isdir(name):
        from huggingface_hub import snapshot_download

        name = snapshot_download(name)
    return mptrain.load(name)


def _layers(model):
    """Layers in the order of modules, each with its entry of FAMILIES."""
    for _, module in list(model.named_modules()):
        names = [cls.__name__ for cls in type(module).__mro__]
        for family in FAMILIES:
            if any(name in family["layers"] for name in names) and _has(module, family["q"]):
                yield module, family


def _has(module, path):
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _shrink(layer, family, left):
    attention = layer.get_submodule(family["attention"])
    head_dim = getattr(attention, family["head_dim"])
    q, k = layer.get_submodule(family["q"]), layer.get_submodule(family["k"])
    width = left["heads"] * head_dim
    heads = left["heads"] * (q.out_features // k.out_features)
    _resize(q, rows=heads * head_dim)
    for name in ("k", "v"):
        _resize(layer.get_submodule(family[name]), rows=width)
    _resize(layer.get_submodule(family["o"]), cols=heads * head_dim)
    for path in family["fc_in"]:
        _resize(layer.get_submodule(path), rows=left["ffn"])
    _resize(layer.get_submodule(family["fc_out"]), cols=left["ffn"])
    if family["heads"]:
        setattr(attention, family["heads"], heads)
    if family["width"]:
        setattr(attention, family["width"], heads * head_dim)
    if family["bias_table"]:
        table = getattr(attention, family["bias_table"])
        setattr(attention, family["bias_table"], nn.Parameter(table.detach()[:, :heads].clone()))


def _resize(linear, rows=None, cols=None):
    linear.weight = nn.Parameter(linear.weight.detach()[:rows, :cols].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:rows].clone())
    linear.out_features, linear.in_features = linear.weight.shape
