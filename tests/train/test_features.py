"""Each row of the table in docs/trainer.md: what scripts use of transformers.Trainer does in ours what it does there.

A feature trains a tiny model with the classes that it is given and returns what has to be equal: to the bit in fp32,
and within the noise of its arithmetic with bf16-master.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from pathlib import Path

import optuna
import pytest
import torch
import transformers
from datasets import Dataset
from kit.long import except_for
from kit.training import Rows, model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
)

import mptrain

PAGE = Path(__file__).parents[2] / "docs" / "trainer.md"
STEPS = 6


class Theirs(transformers.Trainer):
    """Knows that the loss of BERT is the mean of a micro-batch (mptrain/train/loss_items.py)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def still(**config):
    return model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **config)


def fit(trainer, arguments, folder, m=None, given=None, **options):
    """The trainer after training. given: arguments of its class."""
    settings = dict(max_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-3, use_cpu=True, report_to=[])
    settings |= dict(save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, seed=3)
    settings |= dict(optim="sgd") if "optim" not in options else {}  # Adam divides by gradients that are noise in half
    torch.manual_seed(2)
    given = {"train_dataset": Rows(), **(given or {})}
    if "model_init" not in given:
        given["model"] = still() if m is None else m
    made = trainer(args=arguments(output_dir=str(folder), **(settings | {"learning_rate": 0.1} | options)), **given)
    made.train()
    return made


def logged(t, *names):
    return [
        entry[name] for name in names or ("loss", "learning_rate") for entry in t.state.log_history if name in entry
    ]


FEATURES = {}


def feature(row):
    def add(function):
        FEATURES[row] = function
        return function

    return add


@feature("data collators")
def collator(trainer, arguments, folder):
    def short(rows):
        return {
            "input_ids": torch.stack([r["input_ids"][:5] for r in rows]),
            "labels": torch.stack([r["labels"] for r in rows]),
        }

    return logged(fit(trainer, arguments, folder, given={"data_collator": short}))


@feature("`compute_loss` of a subclass")
def own_loss(trainer, arguments, folder):
    class Own(trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, weight=torch.tensor([1.0, 3.0]))
            return (loss, outputs) if return_outputs else loss

    return logged(fit(Own, arguments, folder))


@feature("`compute_loss_func`")
def loss_function(trainer, arguments, folder):
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum") / num_items_in_batch

    return logged(fit(trainer, arguments, folder, given={"compute_loss_func": loss}, gradient_accumulation_steps=2))


@feature("`optimizers=(optimizer, scheduler)`")
def optimizer_pair(trainer, arguments, folder):
    m = still()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
    return logged(fit(trainer, arguments, folder, m, {"optimizers": (optimizer, scheduler)}))


@feature("`optimizer_cls_and_kwargs`")
def optimizer_class(trainer, arguments, folder):
    chosen = (torch.optim.SGD, {"lr": 0.1, "nesterov": True, "momentum": 0.5})
    return logged(fit(trainer, arguments, folder, given={"optimizer_cls_and_kwargs": chosen}))


@feature("`create_optimizer` of a subclass")
def own_optimizer(trainer, arguments, folder):
    class Own(trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
            return self.optimizer

    return logged(fit(Own, arguments, folder))


@feature("`training_step`, `get_train_dataloader` and `log` of a subclass")
def own_steps(trainer, arguments, folder):
    class Own(trainer):
        seen = 0

        def training_step(self, *args, **kwargs):
            Own.seen += 1
            return super().training_step(*args, **kwargs)

        def get_train_dataloader(self):
            return self.accelerator.prepare(torch.utils.data.DataLoader(self.train_dataset, batch_size=4))

        def log(self, logs, *args, **kwargs):
            super().log({**logs, "twice": 2 * logs.get("loss", 0.0)}, *args, **kwargs)

    found = logged(fit(Own, arguments, folder), "loss", "twice")
    return [*found, Own.seen]


@feature("schedulers")
def scheduler(trainer, arguments, folder):
    more = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}, "warmup_steps": 2}
    return logged(fit(trainer, arguments, folder, **more))


@feature("optimizers by name, weight decay, clipping")
def by_name(trainer, arguments, folder):
    more = {"optim": "sgd", "weight_decay": 0.1, "max_grad_norm": 0.05}
    return logged(fit(trainer, arguments, folder, **more), "loss", "grad_norm")


class Ragged(Rows):
    def __getitem__(self, i):
        row = super().__getitem__(i)
        return {"input_ids": row["input_ids"][: 2 + i % 7], "labels": row["labels"]}


def padded(rows):
    ids = torch.nn.utils.rnn.pad_sequence([r["input_ids"] for r in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.stack([r["labels"] for r in rows])}


@feature("`train_sampling_strategy` (batches of similar length)")
def by_length(trainer, arguments, folder):
    given = {"train_dataset": Ragged(), "data_collator": padded}
    return logged(fit(trainer, arguments, folder, given=given, train_sampling_strategy="group_by_length"))


@feature("iterable and streamed data")
def iterable(trainer, arguments, folder):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([Rows()[i] for i in range(40)])

    return logged(fit(trainer, arguments, folder, given={"train_dataset": Stream()}))


@feature("`datasets` and streamed `datasets`")
def hugging_face_data(trainer, arguments, folder):
    from datasets import Dataset

    rows = Rows()
    data = Dataset.from_dict(
        {"input_ids": rows.ids.tolist(), "labels": rows.labels.tolist(), "unused": ["x"] * len(rows)}
    )
    whole = fit(trainer, arguments, folder, given={"train_dataset": data})
    streamed = fit(trainer, arguments, folder, given={"train_dataset": data.to_iterable_dataset()})
    return logged(whole) + logged(streamed)


@feature("gradient checkpointing")
def checkpointing(trainer, arguments, folder):
    return logged(fit(trainer, arguments, folder, gradient_checkpointing=True))


@feature("label smoothing")
def smoothing(trainer, arguments, folder):
    return logged(fit(trainer, arguments, folder, label_smoothing_factor=0.2))


@feature("`neftune_noise_alpha`")
def neftune(trainer, arguments, folder):
    return logged(fit(trainer, arguments, folder, neftune_noise_alpha=2.0))


@feature("gradient accumulation and `num_items_in_batch`")
def items(trainer, arguments, folder):
    class Words(Rows):
        def __getitem__(self, i):
            ids = self.ids[i]
            return {"input_ids": ids, "labels": ids.where(torch.arange(8) >= i % 4, -100)}

    torch.manual_seed(1)
    sizes = dict(
        n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    base = transformers.Trainer if trainer is Theirs else trainer
    m = GPT2LMHeadModel(GPT2Config(**sizes))
    return logged(fit(base, arguments, folder, m, {"train_dataset": Words()}, gradient_accumulation_steps=2))


EVERY = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


@feature("evaluation, metrics, `predict`")
def evaluation(trainer, arguments, folder):
    def right(found):
        return {"right": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    t = fit(
        trainer,
        arguments,
        folder,
        given={"eval_dataset": Rows(16), "compute_metrics": right},
        **(EVERY | {"save_strategy": "no"}),
    )
    predicted = t.predict(Rows(8))
    return [*logged(t, "loss", "eval_loss"), predicted.metrics["test_loss"], *predicted.predictions.flatten().tolist()]


@feature("several evaluation sets")
def evaluation_sets(trainer, arguments, folder):
    sets = {"few": Rows(8), "many": Rows(24)}
    t = fit(trainer, arguments, folder, given={"eval_dataset": sets}, eval_strategy="steps", eval_steps=3)
    return logged(t, "eval_few_loss", "eval_many_loss")


def worsening():
    """A metric of which the first evaluation is the best."""
    count = itertools.count()
    return lambda found: {"score": -next(count)}


@feature("the best model at the end, `save_total_limit`")
def best(trainer, arguments, folder):
    more = {"load_best_model_at_end": True, "metric_for_best_model": "score", "save_total_limit": 2}
    given = {"eval_dataset": Rows(16), "compute_metrics": worsening()}
    t = fit(trainer, arguments, folder, given=given, **(EVERY | more))
    left = sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))
    return [*logged(t, "loss", "eval_loss"), *left, t.evaluate()["eval_loss"]]


@feature("early stopping")
def early(trainer, arguments, folder):
    more = {"load_best_model_at_end": True, "metric_for_best_model": "score", "max_steps": 40}
    given = {
        "eval_dataset": Rows(16),
        "compute_metrics": lambda found, seen=[]: {"score": -len(seen.append(0) or seen)},
    }
    t = fit(trainer, arguments, folder, given=given | {"callbacks": [EarlyStoppingCallback(1)]}, **(EVERY | more))
    return [*logged(t), t.state.global_step]


@feature("callbacks")
def callbacks(trainer, arguments, folder):
    events = []

    class Spy(transformers.TrainerCallback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                events.append(name)
            return super().__getattribute__(name)

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4
            return control

    t = fit(trainer, arguments, folder, given={"callbacks": [Spy()]}, gradient_accumulation_steps=2)
    return [*logged(t), t.state.global_step, *map(hash, events)]


@feature("`model_init`, and training again (what a hyperparameter search does)")
def model_init(trainer, arguments, folder):
    t = fit(trainer, arguments, folder, given={"model_init": lambda: still()})
    first = logged(t)
    torch.manual_seed(2)
    t.train()
    return first + logged(t)


@feature("`auto_find_batch_size`")
def batch_size(trainer, arguments, folder):
    class Small(trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return super().training_step(model, inputs, *args, **kwargs)

    t = fit(Small, arguments, folder, auto_find_batch_size=True)
    return [*logged(t), t._train_batch_size]


@feature("`Seq2SeqTrainer`: `class T(mptrain.Trainer, Seq2SeqTrainer)`, and so its arguments")
def sequence_to_sequence(trainer, arguments, folder):
    kind, both = mixed(trainer, arguments, transformers.Seq2SeqTrainer, transformers.Seq2SeqTrainingArguments)
    torch.manual_seed(1)
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    sizes |= dict(encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=50, max_position_embeddings=32, dropout=0.0)
    m = BartForConditionalGeneration(
        BartConfig(**sizes, pad_token_id=1, decoder_start_token_id=2, forced_eos_token_id=None)
    )

    class Pairs(Rows):
        def __getitem__(self, i):
            return {"input_ids": self.ids[i].clamp_min(3), "labels": self.ids[i].flip(0).clamp_min(3)}

    more = {"predict_with_generate": True, "generation_max_length": 6}
    t = fit(kind, both, folder, m, {"train_dataset": Pairs(), "eval_dataset": Pairs(8)}, **more)
    return [*logged(t), float(t.predict(Pairs(4), max_length=6).predictions.shape[1]), t.evaluate()["eval_loss"]]


@feature("sentence-transformers: `class T(mptrain.Trainer, SentenceTransformerTrainer)`, and so its arguments")
def sentence_transformers(trainer, arguments, folder):
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.models import Pooling, Transformer

    tiny_encoder(folder / "encoder")
    encoder = Transformer(str(folder / "encoder"))
    m = SentenceTransformer(modules=[encoder, Pooling(32)], device="cpu")
    texts = {"anchor": ["a good film", "bad day", "very long rain", "short sun"] * 16}
    data = Dataset.from_dict(texts | {"positive": ["good film", "a bad day", "long rain", "sun"] * 16})
    kind, both = mixed(trainer, arguments, SentenceTransformerTrainer, SentenceTransformerTrainingArguments)
    given = {"train_dataset": data, "loss": MultipleNegativesRankingLoss(m)}
    t = fit(kind, both, folder, m, given, per_device_train_batch_size=4, learning_rate=1e-2)
    t.save_model(str(folder / "saved"))
    saved = SentenceTransformer(str(folder / "saved"), device="cpu")
    assert {p.dtype for p in saved.parameters()} == {torch.float32}  # the masters
    return [*logged(t), *saved.encode(["a good film", "rain"])[:, :4].ravel().tolist()]


def tiny_encoder(folder):
    """A BERT of two layers and its tokenizer, which knows a dozen words."""
    folder.mkdir(parents=True)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a good film bad very long short day rain sun".split()
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = dict(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(1)
    sizes |= dict(vocab_size=len(words), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertModel(BertConfig(**sizes)).save_pretrained(folder)


def mixed(trainer, arguments, other, its_arguments):
    """Another package's Trainer and arguments, alone beside transformers' and with ours before them."""
    if trainer is Theirs:
        return other, its_arguments
    plain = functools.partial if isinstance(arguments, functools.partial) else None
    own = arguments.func if plain else arguments
    both = dataclasses.dataclass(type("Both", (own, its_arguments), {"__module__": __name__}))
    globals()["Both"] = both  # saving pickles it by its name
    return type("T", (trainer, other), {}), functools.partial(both, **arguments.keywords) if plain else both


@feature("`hyperparameter_search` with Optuna")
def search(trainer, arguments, folder):
    rates = [0.01, 0.1, 0.3]
    t = fit(trainer, arguments, folder, given={"model_init": lambda trial=None: still(), "eval_dataset": Rows(16)},
            eval_strategy="steps", eval_steps=STEPS)  # fmt: skip
    found = t.hyperparameter_search(
        backend="optuna",
        n_trials=len(rates),
        direction="minimize",
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        sampler=optuna.samplers.GridSampler({"learning_rate": rates}, seed=0),
    )
    return [found.objective, found.hyperparameters["learning_rate"]]


@feature("`torch_compile` (Inductor)")
def compiled(trainer, arguments, folder):
    return logged(fit(trainer, arguments, folder, torch_compile=True))


OTHERS = {
    "resuming from a checkpoint of transformers": "tests/train/test_trainer.py",
    "PEFT adapters": "tests/train/test_adapters.py",
    "`push_to_hub` without a network": "tests/train/test_features.py",
    "trackers (`report_to`)": "tests/jobs/test_run_trackers.py",
}
"""rows with tests of their own"""

SLOW = ["`torch_compile` (Inductor)", "`auto_find_batch_size`"]
QUICK = [row for row in FEATURES if row not in SLOW]
QUICK_IN_HALF = ["`create_optimizer` of a subclass", "evaluation, metrics, `predict`"]


@pytest.mark.parametrize("row", except_for(FEATURES, QUICK))
def test_it_does_what_transformers_does(row, tmp_path):
    theirs = FEATURES[row](Theirs, transformers.TrainingArguments, tmp_path / "theirs")
    ours = FEATURES[row](mptrain.Trainer, mptrain.TrainingArguments, tmp_path / "ours")
    assert ours == theirs and len(ours) >= 2


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler hides it, which errors get around
@pytest.mark.parametrize("row", except_for(FEATURES, QUICK_IN_HALF))
def test_with_precision_it_is_that_within_the_noise_of_half(row, tmp_path):
    arguments = functools.partial(mptrain.TrainingArguments, precision="bf16-master")
    plain = FEATURES[row](mptrain.Trainer, mptrain.TrainingArguments, tmp_path / "plain")
    half = FEATURES[row](mptrain.Trainer, arguments, tmp_path / "half")
    assert half == pytest.approx(plain, rel=0.05, abs=0.02) and half != plain


def test_the_table_of_the_page_has_these_rows():
    rows = re.findall(r"^\| (?!what a script|---)(.+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(rows) == {*FEATURES, *OTHERS}


def test_pushing_without_a_network_is_the_same_error(tmp_path):
    found = []
    for trainer, arguments in ((Theirs, transformers.TrainingArguments), (mptrain.Trainer, mptrain.TrainingArguments)):
        with pytest.raises(Exception) as caught:  # whatever it is of the hub's
            fit(trainer, arguments, tmp_path, push_to_hub=True, hub_model_id="me/model", hub_token="none")
        found.append((type(caught.value), str(caught.value).split("(Request")[0][:200]))
    assert found[0] == found[1]
