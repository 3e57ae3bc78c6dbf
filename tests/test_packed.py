"""Packed models: what is packed, that nothing is lost on the way back, and that transformers loads it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from admm_nxm import ADMMNxM, Pattern, SelectedWeight, Selection, SparsityViolation, project, verify
from admm_nxm.io.files import open_checkpoint
from admm_nxm.io.packed import load_packed, load_packed_model, pack, unpack
from admm_nxm.io.packing import Layout
from admm_nxm.io.prune import prune_files
from admm_nxm.selection import select_weights
from tests.helpers import assert_same_weights, make_net, same_bits, train
from tests.test_files import listing
from tests.test_packing import sparse_tensors

NAME, BESIDE = "layers.0.fc.weight", "layers.1.bias"
INDEX, PACKED_INDEX = "model.safetensors.index.json", "model.packed.safetensors.index.json"


def sparse(*shape: int, pattern: str = "2:4", dim: int = -1) -> Tensor:
    return project(torch.randn(shape), pattern, dim)


@torch.no_grad()
def pruned(model: Any) -> Any:
    """Project the prunable weights to 2:4 in place."""
    selection, params = select_weights(model, trainable=False)
    for weight in selection:
        params[weight.name].copy_(project(params[weight.name], weight.pattern, weight.dim))
    return model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- nothing is lost


@given(st.lists(sparse_tensors(), min_size=1, max_size=3), st.dictionaries(st.text(max_size=4), st.text(max_size=4)))
@settings(max_examples=60)
def test_a_file_comes_back_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, cases: list[tuple[Tensor, Pattern, int]], metadata: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("file")
    metadata = dict(list(metadata.items())[:1])  # the library writes several in any order
    cases = [
        case for case in cases if case[0].dtype != getattr(torch, "float8_e8m0fnu", None)
    ]  # nor can it write these
    tensors = {f"w{number}.é": w for number, (w, _, _) in enumerate(cases)}
    weights = tuple(
        SelectedWeight(f"w{number}.é", tuple(w.shape), pattern, dim % w.ndim)
        for number, (w, pattern, dim) in enumerate(cases)
    )
    if not weights:
        return
    tensors |= {"other": torch.tensor([-0.0, float("nan")]), "complex": torch.ones(2, dtype=torch.complex64)}
    save_file(tensors, folder / "a", metadata=metadata or None)
    report = pack(folder / "a", folder / "p", select=Selection(weights, ()))
    assert [(w.name, w.pattern, w.dim, w.dtype) for w in report] == [
        (weight.name, weight.pattern, weight.dim, tensors[weight.name].dtype) for weight in weights
    ]
    assert report.bytes_before == sum(t.numel() * t.element_size() for t in tensors.values())
    assert report.bytes_after == sum(t.numel() * t.element_size() for t in load_file(folder / "p").values())
    assert same(load_packed(folder / "p"), tensors)
    unpack(folder / "p", folder / "b")
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    shutil.rmtree(folder)


def test_a_packed_file_says_what_the_format_says(tmp_path: Path) -> None:
    w = sparse(4, 8, dim=0)
    save_file({NAME: w.bfloat16(), BESIDE: torch.ones(3)}, tmp_path / "a", metadata={"format": "pt"})
    pack(tmp_path / "a", tmp_path / "p", select=Selection((SelectedWeight(NAME, (4, 8), Pattern(2, 4), 0),), ()))
    stored = load_file(tmp_path / "p")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
        BESIDE: (torch.float32, (3,)),
        f"{NAME}.packed_values": (torch.bfloat16, (8, 2)),
        f"{NAME}.packed_places": (torch.uint8, (4,)),
    }
    with open_checkpoint(tmp_path / "p") as checkpoint:
        metadata = checkpoint.headers[tmp_path / "p"].metadata
        assert metadata is not None
        assert metadata["format"] == "pt"
        assert json.loads(metadata["admm_nxm"]) == {
            "format": "admm-nxm-packed",
            "version": 1,
            "weights": {
                NAME: {
                    "pattern": "2:4",
                    "shape": [4, 8],
                    "dim": 0,
                    "dtype": "BF16",
                    "places": "bitmask",
                    "signs": False,
                }
            },
        }


def folder_of(model: Any, folder: Path, shard: str | None) -> Path:
    model.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb", encoding="utf-8")
    return folder


def transformers_model(kind: str) -> tuple[Any, Any, dict[str, Tensor]]:
    """A small random model that satisfies 2:4, its Auto class, and inputs for it."""
    transformers = pytest.importorskip("transformers")
    options: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config, auto = {
        "bert": (
            lambda: transformers.BertConfig(**options, intermediate_size=32),
            transformers.AutoModelForMaskedLM,
        ),
        "gpt2": (
            lambda: transformers.GPT2Config(
                vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
            ),
            transformers.AutoModelForCausalLM,
        ),
        "llama": (
            lambda: transformers.LlamaConfig(**options, intermediate_size=32),
            transformers.AutoModelForCausalLM,
        ),
        "t5": (
            lambda: transformers.T5Config(
                vocab_size=50, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, decoder_start_token_id=0
            ),
            transformers.AutoModelForSeq2SeqLM,
        ),
    }[kind]
    model = pruned(auto.from_config(config())).eval()
    inputs = {"input_ids": torch.arange(12).reshape(2, 6)}
    return model, auto, {**inputs, **({"decoder_input_ids": inputs["input_ids"]} if kind == "t5" else {})}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("shard", [None, "5KB"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_transformers_loads_it_with_the_same_outputs(kind: str, shard: str | None, tmp_path: Path) -> None:
    model, auto, inputs = transformers_model(kind)
    folder = folder_of(model, tmp_path / "a", shard)
    report = pack(folder, tmp_path / "p")
    assert {w.name for w in report} == {w.name for w in verify(folder)}
    assert verify(tmp_path / "p") == verify(folder)
    expected = logits(model, inputs)
    for loaded in (
        load_packed_model(tmp_path / "p", auto),
        load_packed_model(tmp_path / "p", type(model)),
        type(model).from_pretrained(None, config=model.config, state_dict=load_packed(tmp_path / "p")),
    ):
        assert same_bits(logits(loaded, inputs), expected)
        assert_same_weights(loaded, model)
    unpack(tmp_path / "p", tmp_path / "b")
    assert listing(tmp_path / "b") == listing(folder)
    assert same_bits(logits(auto.from_pretrained(tmp_path / "b"), inputs), expected)


def test_a_sharded_folder_keeps_its_shards(tmp_path: Path) -> None:
    folder = folder_of(transformers_model("llama")[0], tmp_path / "a", "5KB")
    pack(folder, tmp_path / "p")
    index, packed = (json.loads((tmp_path / name).read_text()) for name in (f"a/{INDEX}", f"p/{PACKED_INDEX}"))
    assert set(packed["weight_map"].values()) == {
        file.replace(".safetensors", ".packed.safetensors") for file in index["weight_map"].values()
    }
    assert packed["metadata"] == index["metadata"]
    held = {name for file in set(packed["weight_map"].values()) for name in load_file(tmp_path / "p" / file)}
    assert set(packed["weight_map"]) == held
    with open_checkpoint(tmp_path / "p" / PACKED_INDEX) as checkpoint:
        assert set(checkpoint.tensors) == set(index["weight_map"])


def sharded_by_hand(folder: Path, shards: dict[str, dict[str, Tensor]]) -> Path:
    folder.mkdir()
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder


def test_the_index_is_written_in_steps_that_grow_with_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 60
    tensors = {f"layers.{k}.fc.weight": sparse(4, 4) for k in range(count)}
    folder = sharded_by_hand(tmp_path / "a", {"model-1.safetensors": tensors})
    parts, asked = Layout.parts, 0

    def counted(layout: Layout) -> Any:
        nonlocal asked
        asked += 1
        assert parts.fget is not None
        return parts.fget(layout)

    monkeypatch.setattr(Layout, "parts", property(counted))
    pack(folder, tmp_path / "p")
    unpack(tmp_path / "p", tmp_path / "b")
    assert asked <= 20 * count  # a few for each weight, and not one for each pair of weights
    assert json.loads((tmp_path / "b" / INDEX).read_text()) == json.loads((folder / INDEX).read_text())
    assert same(load_file(tmp_path / "b" / "model-1.safetensors"), tensors)


def test_a_name_that_is_taken_in_another_shard_is_refused(tmp_path: Path) -> None:
    shards = {
        "model-1.safetensors": {NAME: sparse(4, 8)},
        "model-2.safetensors": {f"{NAME}.packed_values": torch.ones(1)},
    }
    with pytest.raises(ValueError, match=rf"two tensors would be called '{NAME}\.packed_values', one in model-2"):
        pack(sharded_by_hand(tmp_path / "a", shards), tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_transformers_does_not_take_a_packed_folder_for_an_empty_model(tmp_path: Path) -> None:
    model, auto, _ = transformers_model("llama")
    pack(folder_of(model, tmp_path / "a", None), tmp_path / "p")
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
        auto.from_pretrained(tmp_path / "p")


def test_generation_settings_come_along(tmp_path: Path) -> None:
    model, auto, _ = transformers_model("gpt2")
    model.generation_config.max_new_tokens = 7
    pack(folder_of(model, tmp_path / "a", None), tmp_path / "p")
    assert load_packed_model(tmp_path / "p", auto).generation_config.max_new_tokens == 7


def packed_classifier(tmp_path: Path) -> tuple[Path, Path, Any]:
    """A small classifier in a folder, the same packed, and its Auto class."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    folder = folder_of(pruned(transformers.BertForSequenceClassification(config)), tmp_path / "a", None)
    pack(folder, tmp_path / "p")
    return folder, tmp_path / "p", transformers.AutoModelForSequenceClassification


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2},
        {"num_labels": 5, "ignore_mismatched_sizes": True},
        {"attn_implementation": "eager", "output_hidden_states": True},
        {"dtype": torch.bfloat16},
        {"dtype": "float16"},
        {"torch_dtype": torch.float64},
        {"dtype": "auto"},
        {"trust_remote_code": False},
        {"trust_remote_code": True, "num_labels": 3},
    ],
    ids=str,
)
def test_options_do_as_in_from_pretrained(options: dict[str, Any], automatic: bool, tmp_path: Path) -> None:
    folder, packed, auto = packed_classifier(tmp_path)
    model_class = auto if automatic else type(auto.from_pretrained(folder))
    if not {"dtype", "torch_dtype"} & options.keys():
        expected = model_class.from_pretrained(folder, dtype="auto", **options)
    else:
        expected = model_class.from_pretrained(folder, **options)
    loaded = load_packed_model(packed, model_class, **options)
    assert type(loaded) is type(expected)
    assert loaded.dtype == expected.dtype
    assert loaded.config._name_or_path == loaded.name_or_path == loaded.bert.name_or_path == str(packed)
    configs = [{**model.config.to_diff_dict(), "_name_or_path": None} for model in (loaded, expected)]
    assert configs[0] == configs[1]
    assert loaded.config._attn_implementation == expected.config._attn_implementation
    weights, wanted = loaded.state_dict(), expected.state_dict()
    if options.get("num_labels") == 5:  # the head is new, and random
        assert weights["classifier.weight"].shape == wanted["classifier.weight"].shape == (5, 16)
        del weights["classifier.weight"], wanted["classifier.weight"]
    assert same(dict(weights), dict(wanted))


def test_a_config_and_loading_information_do_as_in_from_pretrained(tmp_path: Path) -> None:
    folder, packed, auto = packed_classifier(tmp_path)
    config = auto.from_pretrained(folder).config
    config.hidden_dropout_prob = 0.4
    for model_class in (auto, type(auto.from_pretrained(folder))):
        model, told = load_packed_model(packed, model_class, config=config, output_loading_info=True)
        _, wanted = model_class.from_pretrained(folder, config=config, output_loading_info=True)
        assert model.config.hidden_dropout_prob == 0.4
        assert model.config._name_or_path == str(packed)
        assert told == wanted
        assert not told["missing_keys"]
    assert config._name_or_path == str(folder)


def test_code_of_the_folders_own_is_run_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, packed, _ = packed_classifier(tmp_path)
    (packed / "own_code.py").write_text(
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class OwnModel(BertForSequenceClassification):\n    config_class = OwnConfig\n",
        encoding="utf-8",
    )
    fields = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    fields["model_type"] = "own"
    fields["auto_map"] = {
        "AutoConfig": "own_code.OwnConfig",
        "AutoModelForSequenceClassification": "own_code.OwnModel",
    }
    (packed / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    auto = transformers.AutoModelForSequenceClassification
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_packed_model(packed, auto, trust_remote_code=False)
    model = load_packed_model(packed, auto, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert_same_weights(model, transformers.BertForSequenceClassification.from_pretrained(folder))


@pytest.mark.parametrize("name", ["state_dict", "subfolder", "variant", "gguf_file"])
def test_weights_of_another_place_are_refused(name: str, tmp_path: Path) -> None:
    _, packed, auto = packed_classifier(tmp_path)
    with pytest.raises(TypeError, match=rf"{name}='x' says where the weights are, and they are those of .*p; drop it"):
        load_packed_model(packed, auto, **{name: "x"})


def test_a_model_of_sixteen_bits_keeps_them(tmp_path: Path) -> None:
    model, auto, inputs = transformers_model("llama")
    model = model.bfloat16()
    pack(folder_of(model, tmp_path / "a", None), tmp_path / "p")
    loaded = load_packed_model(tmp_path / "p", auto)
    assert loaded.dtype == torch.bfloat16
    assert same_bits(logits(loaded, inputs), logits(model, inputs))


def test_files_without_an_index_are_packed_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_file({NAME: sparse(8, 8)}, tmp_path / "a" / "x.safetensors")
    save_file({BESIDE: torch.ones(4)}, tmp_path / "a" / "y.safetensors", metadata={"k": "v"})
    pack(tmp_path / "a", tmp_path / "p")
    assert sorted(listing(tmp_path / "p")) == ["x.packed.safetensors", "y.packed.safetensors"]
    unpack(tmp_path / "p", tmp_path / "b")
    assert listing(tmp_path / "b") == listing(tmp_path / "a")


# ---------------------------------------------------------------- modules and state dicts


def test_a_trained_module_is_packed_by_its_selection(tmp_path: Path) -> None:
    net = make_net()
    optimizer = ADMMNxM(torch.optim.AdamW(net.parameters(), lr=1e-2), net, pattern="1:4", total_steps=60)
    train(net, optimizer, 60)
    optimizer.finalize()
    report = pack(net, tmp_path / "net.safetensors", select=optimizer.selection)
    assert [(w.name, str(w.pattern)) for w in report] == [(w.name, "1:4") for w in optimizer.selection]
    assert same(load_packed(tmp_path / "net.safetensors"), dict(net.state_dict()))
    other = make_net(seed=1)
    other.load_state_dict(load_packed(tmp_path / "net.safetensors"))
    assert_same_weights(other, net)


@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="eager"), nn.DataParallel])
def test_a_wrapped_module_is_packed_under_its_own_names(wrap: Any, tmp_path: Path) -> None:
    net = pruned(make_net())
    pack(wrap(net), tmp_path / "net")
    assert same(load_packed(tmp_path / "net"), dict(net.state_dict()))


@pytest.mark.parametrize("as_state_dict", [False, True])
def test_a_tied_weight_is_stored_once_and_found_by_each_name(as_state_dict: bool, tmp_path: Path) -> None:
    net = pruned(make_net())
    net.blocks[1].up = net.blocks[0].up
    single = pack(pruned(make_net()), tmp_path / "single")
    report = pack(net.state_dict() if as_state_dict else net, tmp_path / "net")
    assert len(report.weights) == 3
    assert report.bytes_before < single.bytes_before
    loaded = load_packed(tmp_path / "net")
    assert same(loaded, dict(net.state_dict()))
    assert loaded["blocks.0.up.weight"] is loaded["blocks.1.up.weight"]
    assert {weight.name for weight in verify(tmp_path / "net")} == {w.name for w in report}
    unpack(tmp_path / "net", tmp_path / "dense")
    assert same(load_file(tmp_path / "dense"), dict(net.state_dict()))


@pytest.mark.parametrize("tied", [False, True])
def test_a_state_dict_hook_may_give_other_tensors_of_the_same_names(tied: bool, tmp_path: Path) -> None:
    net = pruned(make_net())
    if tied:
        net.blocks[1].up = net.blocks[0].up

    def clones(module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in state_dict:
            state_dict[name] = state_dict[name].detach().clone()

    net._register_state_dict_hook(clones)
    report = pack(net, tmp_path / "p")
    assert sorted(w.name for w in report) == [f"blocks.{k}.{part}.weight" for k in (0, 1) for part in ("down", "up")]
    assert same(load_packed(tmp_path / "p"), dict(net.state_dict()))


def test_a_state_dict_hook_that_renames_is_named_as_the_cause(tmp_path: Path) -> None:
    net = pruned(make_net())

    def renames(module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in list(state_dict):
            state_dict[f"x.{name}"] = state_dict.pop(name).clone()

    net._register_state_dict_hook(renames)
    with pytest.raises(ValueError, match=r"is not in the module's state dict under this name .*pack the state dict"):
        pack(net, tmp_path / "p")
    assert listing(tmp_path) == {}


def test_views_that_are_conjugate_or_negated_keep_their_values(tmp_path: Path) -> None:
    z = torch.complex(sparse(4, 8), sparse(4, 8))
    tensors = {"layers.0.fc.weight": z.conj().imag, "layers.1.fc.weight": z.imag, "conj": z.conj(), "plain": z}
    assert tensors["layers.0.fc.weight"].is_neg()
    assert tensors["conj"].is_conj()
    report = pack(tensors, tmp_path / "p")
    assert [w.name for w in report] == ["layers.0.fc.weight", "layers.1.fc.weight"]
    expected = {name: t.resolve_conj().resolve_neg() for name, t in tensors.items()}
    loaded = load_packed(tmp_path / "p")
    assert {name: t.tolist() for name, t in loaded.items()} == {name: t.tolist() for name, t in expected.items()}
    assert same_bits(loaded["layers.0.fc.weight"], expected["layers.0.fc.weight"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epoch", 3, r"'epoch' is a int, and a safetensors file holds tensors only; leave it out"),
        (
            "s",
            torch.eye(2).to_sparse(),
            r"'s' is torch.float32 of layout torch.sparse_coo on cpu, and cannot be stored",
        ),
        ("m", torch.empty(2, device="meta"), r"'m' is torch.float32 of layout torch.strided on meta"),
        ("c", torch.ones(2, dtype=torch.complex128), r"'c' is torch.complex128 of layout"),
    ],
)
def test_what_no_file_can_hold_is_refused(name: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=message):
        pack({NAME: sparse(4, 8), name: value}, tmp_path / "p")
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("source", [None, 3, [("a", 1)], torch.ones(4, 4)])
def test_another_source_is_refused(source: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"cannot pack a \w+; a module, a state dict or a path is needed"):
        pack(source, tmp_path / "p")


# ---------------------------------------------------------------- what is packed


def test_every_violation_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    tensors = {f"layers.{k}.fc.weight": sparse(4, 8) for k in range(4)}
    tensors["layers.1.fc.weight"][0] = 1.0
    tensors["layers.3.fc.weight"] += 1.0
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    before = listing(tmp_path)
    for source, output in ((tmp_path / "a", "p"), (tmp_path / "a" / "model.safetensors", "p"), (tensors, "p")):
        with pytest.raises(
            SparsityViolation,
            match=r"^2 of 4 weights violate the pattern, .*; prune them first, .*: "
            r"layers\.1\.fc\.weight: 2 of 8 groups exceed 2:4; layers\.3\.fc\.weight: 8 of 8 groups exceed 2:4$",
        ):
            pack(source, tmp_path / output)
        assert listing(tmp_path) == before


def test_rules_choose_the_weights(tmp_path: Path) -> None:
    tensors = {"head.weight": sparse(4, 8, pattern="1:8"), NAME: torch.randn(4, 8)}
    report = pack(tensors, tmp_path / "p", select={r"head\.weight": "1:8"})
    assert [(w.name, str(w.pattern)) for w in report] == [("head.weight", "1:8")]
    assert same(load_packed(tmp_path / "p"), tensors)


def test_a_weight_that_no_pattern_fits_is_listed(tmp_path: Path) -> None:
    report = pack({NAME: sparse(4, 8), "layers.0.odd.weight": torch.ones(4, 6)}, tmp_path / "p")
    assert [skipped.name for skipped in report.skipped] == ["layers.0.odd.weight"]
    assert "not packed: layers.0.odd.weight (its width 6 along dim 1 is no multiple of 4)" in str(report).split("\n")


def test_nothing_to_pack_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prunable weight"):
        pack({"bias": torch.ones(4)}, tmp_path / "p")


def test_a_group_too_long_is_refused_with_the_weight(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"weight '{NAME}' cannot be packed: group=8192 is too long"):
        pack({NAME: torch.zeros(1, 8192)}, tmp_path / "p", "1:8192")


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"two tensors are called '{NAME}\.packed_places'"):
        pack({NAME: sparse(4, 8), f"{NAME}.packed_places": torch.ones(1)}, tmp_path / "p")
    assert listing(tmp_path) == {}


def test_a_report_prints_as_a_table(tmp_path: Path) -> None:
    report = pack({NAME: sparse(4, 8).bfloat16(), BESIDE: torch.ones(8)}, tmp_path / "p")
    assert str(report).split("\n") == [
        "weights             number  shape  pattern  dtype     bytes  packed  ratio",
        "------------------  ------  -----  -------  --------  -----  ------  -----",
        "layers.0.fc.weight       1  4x8    2:4      bfloat16     64      36  56.2%",
        "1 weights packed to 56.2% of their size",
        "all tensors: 96 bytes before, 68 after (70.8%)",
    ]
    assert (report.ratio, report.weights[0].ratio) == (68 / 96, 0.5625)


# ---------------------------------------------------------------- places


def packed_and_dense(tmp_path: Path) -> tuple[Path, Path]:
    """Two files: a packed one and the same unpacked."""
    pack({NAME: sparse(4, 8), BESIDE: torch.ones(4)}, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "dense")
    return tmp_path / "packed", tmp_path / "dense"


def test_what_is_packed_is_not_packed_again(tmp_path: Path) -> None:
    packed, dense = packed_and_dense(tmp_path)
    with pytest.raises(ValueError, match=r"packed is packed already; unpack it first"):
        pack(packed, tmp_path / "twice")
    for function in (lambda: unpack(dense, tmp_path / "twice"), lambda: load_packed(dense)):
        with pytest.raises(ValueError, match=r"dense holds no packed weight; it can be loaded as it is"):
            function()
    assert not (tmp_path / "twice").exists()


def test_an_index_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = folder_of(transformers_model("llama")[0], tmp_path / "a", "5KB")
    with pytest.raises(ValueError, match=rf"{INDEX} is an index; name its folder, .*a$"):
        pack(folder / INDEX, tmp_path / "p")
    pack(folder, tmp_path / "p")
    with pytest.raises(ValueError, match=rf"{PACKED_INDEX} is an index; name its folder"):
        unpack(tmp_path / "p" / PACKED_INDEX, tmp_path / "b")


def test_what_exists_is_kept_unless_overwriting_is_allowed(tmp_path: Path) -> None:
    packed, dense = packed_and_dense(tmp_path)
    before = listing(tmp_path)
    for function in (pack, unpack):
        with pytest.raises(FileExistsError, match="exists; choose another place"):
            function(*((dense, packed) if function is pack else (packed, dense)))
    assert listing(tmp_path) == before
    pack(dense, packed, overwrite=True)
    unpack(packed, dense, overwrite=True)
    assert listing(tmp_path) == before


def test_a_file_is_never_written_in_its_own_place(tmp_path: Path) -> None:
    packed, dense = packed_and_dense(tmp_path)
    before = listing(tmp_path)
    for function, place in ((pack, dense), (unpack, packed), (prune_files, dense)):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=rf"{place.name} is what is read; write to another file"):
                function(place, place, overwrite=overwrite)
    assert listing(tmp_path) == before


def test_a_folder_is_overwritten_as_a_whole_and_never_the_source(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_file({NAME: sparse(4, 8)}, tmp_path / "a" / "model.safetensors")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "old").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        pack(tmp_path / "a", tmp_path / "p")
    pack(tmp_path / "a", tmp_path / "p", overwrite=True)
    assert sorted(listing(tmp_path / "p")) == ["model.packed.safetensors"]
    for place in (tmp_path / "a", tmp_path, tmp_path / "a" / "inside"):
        with pytest.raises(ValueError, match="what is read"):
            pack(tmp_path / "a", place, overwrite=True)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = folder_of(transformers_model("llama")[0], tmp_path / "a", "5KB")
    pack(folder, tmp_path / "p")
    shard = min(file.name for file in folder.glob("*.safetensors"))
    shutil.copy(folder / shard, tmp_path / "p")
    with pytest.raises(ValueError, match=rf"holds both {shard} and a file that would be called so"):
        unpack(tmp_path / "p", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_links_to_folders_and_dangling_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_file({NAME: sparse(4, 8)}, tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "link").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match="link is a link to a folder, and is not followed"):
        pack(tmp_path / "a", tmp_path / "p")
    (tmp_path / "a" / "link").unlink()
    (tmp_path / "a" / "link").symlink_to("absent")
    with pytest.raises(ValueError, match="link is a dangling link or no file"):
        pack(tmp_path / "a", tmp_path / "p")


def test_links_to_files_are_copied_as_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_file({NAME: sparse(4, 8)}, tmp_path / "blob")
    (tmp_path / "a" / "model.safetensors").symlink_to(tmp_path / "blob")
    (tmp_path / "config").write_text("{}", encoding="utf-8")
    (tmp_path / "a" / "config.json").symlink_to(tmp_path / "config")
    pack(tmp_path / "a", tmp_path / "p")
    unpack(tmp_path / "p", tmp_path / "b")
    assert listing(tmp_path / "b") == {"model.safetensors": (tmp_path / "blob").read_bytes(), "config.json": b"{}"}
    assert not any(path.is_symlink() for path in (*(tmp_path / "p").iterdir(), *(tmp_path / "b").iterdir()))


def test_a_weight_that_changes_while_it_is_packed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = sparse(4, 8)
    monkeypatch.setattr("admm_nxm.io.packed.pack_tensor", lambda t, *a, **k: original(t * -1, *a, **k))
    from admm_nxm.io.packing import pack_tensor as original

    with pytest.raises(ValueError, match=f"'{NAME}' changed while it was packed"):
        pack({NAME: w}, tmp_path / "p")
    assert listing(tmp_path) == {}


def test_a_file_without_a_config_is_no_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    packed, _ = packed_and_dense(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is no model folder .*; use load_packed for its tensors"):
        load_packed_model(packed, object)


def test_without_transformers_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'transformers is needed for this; run in .*: pip install "\.\[hf\]"'):
        load_packed_model(tmp_path, object)


# ---------------------------------------------------------------- pruning


@pytest.mark.parametrize("form", ["layers.{}._orig_mod.fc.{}", "module.layers.{}.fc.{}", "_orig_mod.layers.{}.fc.{}"])
@pytest.mark.parametrize("rules", [None, {r"layers\..*weight": "2:4"}])
def test_weights_of_a_wrapped_model_are_pruned(form: str, rules: Any, tmp_path: Path) -> None:
    tensors = {form.format(k, part): torch.randn(8, 8) for k in (0, 1) for part in ("weight", "bias2d")}
    save_file(tensors, tmp_path / "a")
    report = prune_files(tmp_path / "a", tmp_path / "b", select=rules)
    assert report.ok
    assert [w.name for w in report] == ["layers.0.fc.weight", "layers.1.fc.weight"]
    expected = {name: project(t, "2:4") if name.endswith("weight") else t for name, t in tensors.items()}
    assert same(load_file(tmp_path / "b"), expected)


def test_a_selection_is_pruned_under_each_name_of_a_tied_weight(tmp_path: Path) -> None:
    tensors = {name: torch.randn(8, 8) for name in ("a.weight", "b.weight", "c.weight", "d.weight")}
    save_file(tensors, tmp_path / "a")
    weights = (
        SelectedWeight("a.weight", (8, 8), Pattern(1, 4), 0, ("gone.weight", "b.weight")),
        SelectedWeight("c.weight", (8, 8), Pattern(2, 8), 1),
    )
    report = prune_files(tmp_path / "a", tmp_path / "b", select=Selection(weights, ()))
    assert [(w.name, str(w.pattern), w.dim, w.ok) for w in report] == [
        ("a.weight", "1:4", 0, True),
        ("c.weight", "2:8", 1, True),
    ]
    expected = {name: project(tensors[name], "1:4", 0) for name in ("a.weight", "b.weight")}
    expected |= {"c.weight": project(tensors["c.weight"], "2:8"), "d.weight": tensors["d.weight"]}
    assert same(load_file(tmp_path / "b"), expected)


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [
        (torch.ones(4, 8, dtype=torch.int8), (4, 8), r"cannot be pruned to 2:4: cannot project torch\.int8"),
        (torch.ones(4, 8), (8, 4), r"the selection names weight 'w' of shape \(8, 4\)"),
        (torch.ones(4, 6), (4, 6), r"weight 'w' of shape \(4, 6\) cannot be pruned to 2:4: width 6"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused_with_the_weight(
    value: Tensor, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    save_file({"w": value}, tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        prune_files(
            tmp_path / "a", tmp_path / "b", select=Selection((SelectedWeight("w", shape, Pattern(2, 4), 1),), ())
        )
    assert not (tmp_path / "b").exists()


def test_the_second_name_of_a_tied_weight_must_fit_as_well(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 8), "b": torch.ones(8, 8)}, tmp_path / "a")
    selection = Selection((SelectedWeight("a", (4, 8), Pattern(2, 4), 1, ("b",)),), ())
    with pytest.raises(ValueError, match=r"weight 'b' of shape \(8, 8\) cannot be pruned to 2:4: the selection gives"):
        prune_files(tmp_path / "a", tmp_path / "b", select=selection)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.bfloat16])
def test_weights_of_few_bits_are_pruned(dtype: torch.dtype, tmp_path: Path) -> None:
    w = torch.randn(8, 16).to(dtype)
    save_file({NAME: w}, tmp_path / "a")
    assert prune_files(tmp_path / "a", tmp_path / "b").sparsity >= 0.5
    pruned_weight = load_file(tmp_path / "b")[NAME]
    assert pruned_weight.dtype == dtype
    assert same_bits(pruned_weight.to(torch.float32), project(w.to(torch.float32), "2:4"))


def test_errors_of_pruning_advise_what_it_has(tmp_path: Path) -> None:
    save_file({NAME: torch.ones(4, 6)}, tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"cannot be pruned to 2:4: .*choose another pattern, or leave it dense by a select rule$"
    ):
        prune_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("function", [pack, unpack, prune_files])
def test_a_folder_is_copied_without_version_control(function: Any, tmp_path: Path) -> None:
    (tmp_path / "a" / ".git").mkdir(parents=True)
    (tmp_path / "a" / ".git" / "HEAD").write_bytes(b"ref")
    (tmp_path / "a" / ".model.0123456789ab.tmp.safetensors").write_bytes(b"half")
    (tmp_path / "a" / "config.json").write_bytes(b"{}")
    if function is unpack:
        pack({NAME: sparse(4, 8)}, tmp_path / "a" / "model.packed.safetensors")
    else:
        save_file({NAME: sparse(4, 8)}, tmp_path / "a" / "model.safetensors")
    function(tmp_path / "a", tmp_path / "b")
    model = "model.packed.safetensors" if function is pack else "model.safetensors"
    record = ["admm_nxm.json"] if function is prune_files else []
    assert sorted(listing(tmp_path / "b")) == [*record, "config.json", model]


# ---------------------------------------------------------------- memory

MEASURE = """
import sys, torch
from pathlib import Path
from admm_nxm.io.packed import pack, unpack
from admm_nxm import verify
from admm_nxm.io import packing

torch.set_num_threads(1)
packing._ENTRIES_AT_ONCE = 1 << 16
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
import threading
peak, base, stop = 0, anonymous(), threading.Event()
def watch():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, anonymous() - base)
thread = threading.Thread(target=watch)
thread.start()
folder = Path(sys.argv[1])
pack(folder / "a", folder / "p")
unpack(folder / "p", folder / "b")
verify(folder / "p")
stop.set()
thread.join()
print(peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    tensors = {f"layers.{k}.fc.weight": sparse(512, 1024) for k in range(40)}
    largest = 4 * 512 * 1024
    save_file(tensors, tmp_path / "a")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    # Half of the file: what a few of them take on the way, and what Python and torch allocate for themselves.
    assert int(done.stdout) < 20 * largest


def test_packed_weights_do_not_take_the_name_of_ordinary_ones_in_a_model_folder(tmp_path: Path) -> None:
    """A loader would find model.safetensors there, none of the packed weights in it, and start from random ones."""
    (tmp_path / "config.json").write_text("{}")
    weights = {NAME: sparse(8, 16)}
    save_file(weights, tmp_path / "model.safetensors")
    for source in (weights, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match=r"name it other\.packed\.safetensors"):
            pack(source, tmp_path / "other.safetensors")
    assert sorted(listing(tmp_path)) == ["config.json", "model.safetensors"]
    pack(weights, tmp_path / "other.packed.safetensors")
    assert same(load_packed(tmp_path / "other.packed.safetensors"), weights)


def test_a_folder_does_not_take_the_name_of_a_file(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    source.mkdir()
    save_file({NAME: sparse(8, 16)}, source / "model.safetensors")
    for write in (pack, prune_files):
        with pytest.raises(ValueError, match=r"out\.safetensors is to be a folder"):
            write(source, tmp_path / "out.safetensors", "2:4")
    assert sorted(listing(tmp_path)) == ["dense", "dense/model.safetensors"]
