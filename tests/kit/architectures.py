"""A tiny random model of very many architectures of transformers, with a batch to train on.

`ARCHITECTURES` names them by model type; `build(name)` makes the model and its inputs. A config is shrunk by the names
that sizes have in transformers (`SMALL`), and by what a type needs beside. All dropout, masking and jitter is off.
MobileNet is left out: its 53 batch norms in a row amplify the rounding of random weights to 5% of the loss, under
autocast too.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_hidden_size"), 48
    ),
    **dict.fromkeys(
        ("hidden_dim", "n_inner", "d_inner", "moe_intermediate_size", "shared_expert_intermediate_size"), 48
    ),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size"), 8),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "seq_length", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 64),
    **{"vocab_size": 99, "image_size": 32, "patch_size": 8, "num_channels": 3, "type_vocab_size": 2},
    **{"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "rotary_dim": 4},
    **{"moe_num_experts": 4, "use_cache": False, "problem_type": "single_label_classification"},
}
OFF = ("drop", "mask_time_prob", "mask_feature_prob", "jitter", "layerdrop", "mask_ratio", "router_z")

WIDE = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}
CONV = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (5, 4), "num_feat_extract_layers": 2}
SPEECH = {
    **CONV,
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8},
    **{"apply_spec_augment": False, "vocab_size": 20},
}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWERS = {
    "text_config": {**TOWER, "vocab_size": 99, "max_position_embeddings": 32, "projection_dim": 8, "eos_token_id": 2},
    "vision_config": {**TOWER, "image_size": 16, "patch_size": 8, "projection_dim": 8},
}
SERIES = {"prediction_length": 4, "context_length": 16, "num_time_features": 1, "lags_sequence": [1, 2]}

WORDS, PAIRS, LABELS, PICTURES, SOUND, TIMES = "words", "pairs", "labels", "pictures", "sound", "times"

Row = tuple[str, str, dict[str, Any]]


def _rows(task: str, head: str, names: str, **more: dict[str, Any]) -> dict[str, Row]:
    own = {key.replace("__", "-"): value for key, value in more.items()}
    return {name: (task, head, own.get(name, {})) for name in names.split()}


ARCHITECTURES: dict[str, Row] = {
    **_rows(
        WORDS,
        "AutoModelForCausalLM",
        "gpt2 gpt_neo gpt_neox gptj opt bloom llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 falcon mpt"
        " stablelm starcoder2 olmo olmo2 cohere granite mixtral qwen2_moe qwen3_moe mamba mamba2 rwkv xglm codegen"
        " biogpt persimmon recurrent_gemma nemotron glm smollm3 ctrl openai-gpt deepseek_v3 gpt_oss falcon_mamba"
        " gpt_bigcode helium lfm2 modernbert-decoder",
        gpt_neo={"attention_types": [[["global", "local"], 1]]},
        deepseek_v3={
            **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
            **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
        },
        mamba2={"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4},
        recurrent_gemma={"lru_width": 32, "attention_window_size": 8},
        rwkv={"attention_hidden_size": 32, "context_length": 64},
        gpt_oss={"num_experts_per_tok": 2, "head_dim": 8},
        phi3={"rope_parameters": None},
    ),
    **_rows(
        LABELS,
        "AutoModelForSequenceClassification",
        "bert roberta xlm-roberta distilbert albert electra deberta deberta-v2 mpnet modernbert camembert xlm flaubert"
        " funnel longformer big_bird mobilebert squeezebert rembert convbert fnet roformer megatron-bert canine ernie"
        " data2vec-text nystromformer yoso mra layoutlm lilt perceiver xlnet esm ibert nomic_bert eurobert xmod",
        mobilebert={"true_hidden_size": 32, "intra_bottleneck_size": 32},
        squeezebert={"q_groups": 1, "k_groups": 1, "v_groups": 1, "post_attention_groups": 1, "intermediate_groups": 1},
        funnel={"block_sizes": [1, 1], "num_decoder_layers": 1},
        longformer={"attention_window": [4, 4]},
        perceiver={
            **{"num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 1},
            **{"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "max_position_embeddings": 12},
        },
        xmod={"languages": ["en_XX"], "default_language": "en_XX"},
        canine={"num_hash_buckets": 64, "num_hash_functions": 4, "downsampling_rate": 2, "local_transformer_stride": 4},
        big_bird={"attention_type": "original_full"},
        nystromformer={"num_landmarks": 4, "segment_means_seq_len": 12},
        lilt={"hidden_size": 48, "channel_shrink_ratio": 4},
        modernbert={"global_attn_every_n_layers": 2, "local_attention": 4},
        esm={"position_embedding_type": "rotary", "mask_token_id": 3},
    ),
    **_rows(
        PAIRS,
        "AutoModelForSeq2SeqLM",
        "t5 mt5 umt5 bart mbart pegasus pegasus_x marian blenderbot blenderbot-small m2m_100 led prophetnet longt5"
        " switch_transformers nllb-moe bigbird_pegasus plbart mvp fsmt",
        led={"attention_window": [4, 4], "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
        longt5={"local_radius": 3, "global_block_size": 4},
        pegasus_x={"block_size": 4, "num_global_tokens": 4},
        bigbird_pegasus={"attention_type": "original_full"},
        fsmt={"src_vocab_size": 99, "tgt_vocab_size": 99, "langs": ["en", "de"]},
        prophetnet={"num_buckets": 8, "relative_max_distance": 16},
        nllb__moe={"expert_capacity": 8, "router_dtype": "float32"},
        switch_transformers={"expert_capacity": 8},
    ),
    **_rows(
        PICTURES,
        "AutoModelForImageClassification",
        "vit beit swin swinv2 convnext convnextv2 resnet regnet mobilevit segformer dinov2 dinov2_with_registers cvt"
        " poolformer pvt efficientnet vit_msn data2vec-vision focalnet bit hiera mobilevitv2"
        " swiftformer ijepa",
        swin={"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 2},
        swinv2={"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 2},
        focalnet={"embed_dim": 16, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3], "patch_size": 4},
        convnext=WIDE,
        convnextv2=WIDE,
        resnet={**WIDE, "embedding_size": 16},
        regnet={**WIDE, "embedding_size": 16, "groups_width": 8},
        bit={**WIDE, "embedding_size": 16, "num_groups": 4},
        mobilevit={"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "patch_size": 2},
        mobilevitv2={"patch_size": 2, "image_size": 64},
        segformer={
            **{"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "num_attention_heads": [2, 4]},
            **{"sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]},
        },
        pvt={
            **{"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "num_attention_heads": [2, 4]},
            **{"sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [2, 2]},
        },
        cvt={
            **{"patch_sizes": [3, 3, 3], "patch_stride": [2, 2, 2], "patch_padding": [1, 1, 1], "depth": [1, 2, 3]},
            **{"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "mlp_ratio": [2.0] * 3},
            **dict.fromkeys(("attention_drop_rate", "drop_rate", "drop_path_rate"), [0.0] * 3),
        },
        poolformer={
            **{"depths": [1, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1]},
            **{"num_encoder_blocks": 2},
        },
        swiftformer={"depths": [1, 1], "embed_dims": [16, 32], "downsamples": [True, True], "image_size": 64},
        efficientnet={
            **{"in_channels": [32, 16], "out_channels": [16, 16], "kernel_sizes": [3, 3], "strides": [1, 2]},
            **{"num_block_repeats": [1, 1], "expand_ratios": [1, 2], "depthwise_padding": [], "hidden_dim": 1280},
            **{"width_coefficient": 1.0, "depth_coefficient": 1.0},
        },
        hiera={
            **{"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "image_size": [32, 32], "patch_size": [7, 7]},
            **{"patch_stride": [4, 4], "patch_padding": [3, 3], "masked_unit_size": [4, 4], "num_query_pool": 1},
        },
    ),
    **_rows(PICTURES, "DeiTForImageClassification", "deit"),
    **_rows(
        PICTURES,
        "LevitForImageClassification",
        "levit",
        levit={
            **{"hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 4, 4], "depths": [1, 1, 1], "image_size": 64},
            **{"key_dim": [8, 8, 8], "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2], "patch_size": 16},
        },
    ),
    **_rows(
        SOUND,
        "AutoModelForAudioClassification",
        "wav2vec2 hubert wavlm unispeech unispeech-sat sew sew-d data2vec-audio wav2vec2-conformer"
        " audio-spectrogram-transformer whisper",
        **dict.fromkeys(("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech__sat", "wav2vec2__conformer"), SPEECH),
        data2vec__audio={**SPEECH, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2},
        sew={**SPEECH, "squeeze_factor": 1},
        sew__d={**SPEECH, "squeeze_factor": 1},
        audio__spectrogram__transformer={"max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
        whisper={"num_mel_bins": 16, "max_source_positions": 16, "classifier_proj_size": 8},
    ),
    **_rows(
        TIMES,
        "",
        "patchtst patchtsmixer time_series_transformer informer autoformer",
        patchtst={"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4},
        patchtsmixer={"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4},
        time_series_transformer=SERIES,
        informer=SERIES,
        autoformer={**SERIES, "moving_average": 3, "label_length": 4},
    ),
    **_rows("towers", "AutoModel", "clip siglip chinese_clip", clip=TOWERS, siglip=TOWERS, chinese_clip=TOWERS),
    **_rows(
        "speech",
        "AutoModelForSpeechSeq2Seq",
        "speech_to_text",
        speech_to_text={"input_feat_per_channel": 16, "conv_channels": 16},
    ),
    **_rows("captions", "", "vision-encoder-decoder"),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """The model in training mode and keyword arguments that give a loss."""
    task, head, own = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if task == "captions":
            return _captions()
        config = _config(name, own)
        if task == TIMES:
            kind = "PatchTSMixer" if name == "patchtsmixer" else type(config).__name__.removesuffix("Config")
            model = getattr(t, f"{kind}ForPrediction")(config)
        else:
            model = getattr(t, head).from_config(config) if head.startswith("Auto") else getattr(t, head)(config)
        return _spread(model), _batch(task, config, set(inspect.signature(model.forward).parameters))


def without_loss(name: str, batch: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with nothing to compute a loss from; targets of a decoder are what it reads."""
    found = {key: value for key, value in batch.items() if key not in ("labels", "return_loss")}
    decodes = ARCHITECTURES[name][0] in (PAIRS, "speech", "captions")
    return found | ({"decoder_input_ids": batch["labels"]} if decodes else {})


def _spread(model: nn.Module) -> nn.Module:
    """No parameter stays at zero: the norm of a class token that is would divide by nothing but its epsilon."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def _config(name: str, own: dict[str, Any]) -> Any:
    kind = type(t.AutoConfig.for_model(name))
    known = vars(kind())
    always = {"num_labels": 3, "decoder_start_token_id": 2}
    config = kind(**{**{k: v for k, v in SMALL.items() if k in known}, **always, **own})
    config.num_labels = 3
    _quiet(config)
    return config


def _quiet(config: Any) -> None:
    for key, value in list(vars(config).items()):
        if isinstance(value, t.PreTrainedConfig):
            _quiet(value)
        elif any(word in key for word in OFF) and isinstance(value, float):
            setattr(config, key, 0.0)


def _captions() -> tuple[nn.Module, dict[str, Any]]:
    decoder = _config("gpt2", {"add_cross_attention": True, "is_decoder": True})
    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(_config("vit", {}), decoder)
    config.decoder_start_token_id, config.pad_token_id = 0, 1
    return _spread(t.VisionEncoderDecoderModel(config)), {"pixel_values": torch.randn(2, 3, 32, 32), "labels": _ids(99)}


def _ids(vocabulary: int, length: int = 12) -> Tensor:
    return torch.randint(3, vocabulary, (2, length))


def _batch(task: str, config: Any, accepted: set[str]) -> dict[str, Any]:
    classes = {"labels": torch.tensor([0, 2])}
    if task in (WORDS, PAIRS):
        ids = _ids(SMALL["vocab_size"])
        return {"input_ids": ids, "labels": ids}
    if task == LABELS:
        return {"inputs" if "inputs" in accepted else "input_ids": _ids(SMALL["vocab_size"]), **classes}
    if task == PICTURES:
        size = getattr(config, "image_size", 32)
        side = size[0] if isinstance(size, (list, tuple)) else size
        return {"pixel_values": torch.randn(4, 3, side, side), "labels": torch.tensor([0, 2, 1, 2])}
    if task == "towers":
        return {"input_ids": _ids(99, 8), "pixel_values": torch.randn(2, 3, 16, 16), "return_loss": True}
    if task in (SOUND, "speech"):
        words = {"labels": _ids(SMALL["vocab_size"])} if task == "speech" else classes
        if "input_features" in accepted:
            shape = (2, 32, 16) if task == "speech" else (2, 16, 32)
            return {"input_features": torch.randn(shape), **words}
        spectrogram = hasattr(config, "max_length") and hasattr(config, "time_stride")
        return {"input_values": torch.randn(2, 32, 16) if spectrogram else torch.randn(2, 400), **words}
    # values around 100, as series are
    if hasattr(config, "lags_sequence"):
        length = config.context_length + max(config.lags_sequence)
        past, future = 100 + torch.randn(2, length), 100 + torch.randn(2, config.prediction_length)
        times = torch.arange(length + config.prediction_length).float().expand(2, -1)[..., None]
        return {
            **{
                "past_values": past,
                "past_time_features": times[:, :length],
                "past_observed_mask": torch.ones(2, length),
            },
            **{"future_values": future, "future_time_features": times[:, length:]},
        }
    future = 100 + torch.randn(2, config.prediction_length, 2)
    return {"past_values": 100 + torch.randn(2, config.context_length, 2), "future_values": future}
