"""How a GGUF file is found, its parts, and damaged ones: errors name file, key and tensor."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import load_config, load_model, resolve_dtype, resolve_model
from streamserve.models.gguf.config import _read
from streamserve.models.gguf.tensors import GgufTensors
from tests.models.gguf_files import Kind, write_gguf
from tests.models.native import GQA

CPU = torch.device("cpu")
VALUES = {
    "context_length": 128,
    "embedding_length": 32,
    "block_count": 3,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
}


@pytest.fixture
def write(tmp_path, build):
    """Writes a tiny llama's file, its metadata changed; returns (path, model)."""

    def write(name="m.gguf", architecture="llama", **options):
        values = {**VALUES, **options.pop("values", {})}
        model = build(transformers.LlamaConfig(**GQA))
        write_gguf(tmp_path / name, model, architecture, values, **options)
        return tmp_path / name, model

    return write


def _load(path: Path, kernels):
    return load_model(path, dtype=torch.float32, device=CPU, kernels=kernels)


def test_a_file_a_directory_and_a_part_are_found(write, tmp_path):
    path, _ = write()
    assert resolve_model(str(path)) == path
    assert resolve_model(str(tmp_path)) == path
    assert resolve_model(str(tmp_path), load_format="gguf") == path
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path  # what a directory was before
    assert resolve_model(str(tmp_path), load_format="gguf") == path
    part = tmp_path / "big-00002-of-00003.gguf"
    part.touch()
    assert resolve_model(str(part)).name == "big-00001-of-00003.gguf"
    with pytest.raises(ModelLoadError, match=r"several GGUF .* name one of big-00001.*, m\.gguf"):
        resolve_model(str(tmp_path), load_format="gguf")
    with pytest.raises(ModelLoadError, match="is a GGUF file, which is not read as safetensors"):
        resolve_model(str(path), load_format="safetensors")
    with pytest.raises(ModelLoadError, match=r"none\.gguf': there is no such file"):
        resolve_model(str(tmp_path / "none.gguf"))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    with pytest.raises(ModelLoadError, match=r"is no GGUF file: .* are given by their directory"):
        resolve_model(str(weights))
    blob = path.rename(tmp_path / "sha256-0123")  # as Ollama calls them
    assert resolve_model(str(blob)) == blob
    assert load_config(blob).architecture == "LlamaForCausalLM"
    (tmp_path / "mmproj-m.gguf").touch()  # what looks at pictures
    part.unlink()
    blob.rename(path)
    assert resolve_model(str(tmp_path), load_format="gguf") == path
    with pytest.raises(UnsupportedModelError, match=r"--hf-overrides is for a config\.json"):
        load_config(path, hf_overrides={"hidden_size": 1})
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelLoadError, match="empty holds no GGUF file"):
        resolve_model(str(empty), load_format="gguf")


def test_a_hub_id_and_a_kind_are_a_file_of_the_hubs_cache(tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    names = ["m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "mmproj-Q4_K_M.gguf", "m.q8_0.gguf"]
    names += [f"big/m-Q6_K-0000{part}-of-00002.gguf" for part in (1, 2)]
    names += ["BF16/part.gguf", "m-Q4_K_S.gguf", "a-IQ4_XS.gguf", "b-IQ4_XS.gguf"]
    for name in names:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).touch()

    def find(name: str, **options) -> str:
        found = resolve_model(name, cache_dir=tmp_path, local_files_only=True, **options)
        return found.relative_to(snapshot).as_posix()

    for kind, name in (
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("UD-Q4_K_M", "m-UD-Q4_K_M.gguf"),
        ("Q8_0", "m.q8_0.gguf"),
        ("Q6_K", "big/m-Q6_K-00001-of-00002.gguf"),
        ("BF16", "BF16/part.gguf"),
    ):
        assert find(f"owner/name:{kind}") == name
    assert find("owner/name", load_format="gguf") == "m-Q4_K_M.gguf"
    with pytest.raises(
        ModelLoadError, match=r"owner/name: there is no GGUF file of kind Q5_K_M.*Q4_K"
    ):
        find("owner/name:Q5_K_M")
    with pytest.raises(ModelLoadError, match=r"several GGUF files of kind IQ4_XS: a-\S+, b-"):
        find("owner/name:IQ4_XS")
    with pytest.raises(ModelLoadError, match="no GGUF file of kind Q4_K on"):
        find("owner/name:Q4_K")
    with pytest.raises(ModelLoadError, match="is a GGUF file, which is not read as pt"):
        find("owner/name:Q8_0", load_format="pt")
    with pytest.raises(ModelLoadError, match=r"'other/name:Q8_0': .*the hub did not give it"):
        find("other/name:Q8_0")


def test_parts_are_read_as_one(write, tmp_path, kernels):
    whole, _ = write()
    # A handful of parts, as `llama-gguf-split` writes them.
    write("split.gguf", split_max_size=40_000)
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) > 2
    expected = dict(_weights(_load(whole, kernels)))
    for name, weight in _weights(_load(parts[1], kernels)):
        assert torch.equal(weight, expected[name])
    assert load_config(parts[0]).spec == load_config(whole).spec
    data = parts[1].read_bytes()
    at = data.index(b"split.no") + len(b"split.no") + 4
    parts[1].write_bytes(data[:at] + bytes([7]) + data[at + 1 :])
    with pytest.raises(ModelLoadError, match="does not say that it is part 2 of"):
        load_config(parts[0])
    names = [re.findall(rb"blk\.\d\.\w+\.weight", part.read_bytes()) for part in parts[:2]]
    mine, theirs = next((a, b) for a in names[1] for b in names[0] if len(a) == len(b))
    parts[1].write_bytes(data.replace(mine, theirs))
    with pytest.raises(ModelLoadError, match="and in a part before it"):
        load_config(parts[0])
    at = (whole := parts[0].read_bytes()).index(b"split.tensors.count") + len(
        b"split.tensors.count"
    )
    parts[1].write_bytes(data)
    parts[0].write_bytes(whole[: at + 4] + bytes([99]) + whole[at + 5 :])
    with pytest.raises(ModelLoadError, match=r"its parts hold \d+ tensors of \d+"):
        load_config(parts[0])
    parts[0].write_bytes(whole)
    parts[1].write_bytes(data)
    parts[-1].unlink()
    with pytest.raises(ModelLoadError, match=rf"one of {len(parts)} parts, and split-.* not there"):
        load_config(parts[0])


def test_data_begin_where_the_file_says(write, kernels):
    paths = [write()[0], write("wide.gguf", text=lambda w: w.add_custom_alignment(4096))[0]]
    assert paths[1].stat().st_size > paths[0].stat().st_size + 4096
    for (_, weight), (_, other) in zip(*(_weights(_load(p, kernels)) for p in paths), strict=True):
        assert torch.equal(weight, other)


def _weights(decoder):
    for index, linear in enumerate(decoder.linears()):
        yield index, linear.weight


def test_dtype_auto_on_a_gpu_is_the_files_own(write):
    for kind, dtype in ((Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)):
        path, _ = write(f"{kind.name}.gguf", kind=lambda name, kind=kind: kind)
        assert resolve_dtype("auto", load_config(path), torch.device("cuda")) == dtype


def test_recommended_sampling_and_ends_are_read(write):
    def text(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(
            ["a", "<|im_end|>", "<eos>", "<|endoftext|>"] + [f"t{n}" for n in range(93)]
        )
        writer.add_eos_token_id(2)
        writer.add_float32("general.sampling.temp", 0.6)
        writer.add_int32("general.sampling.top_k", 20)

    config = load_config(write(text=text)[0])
    assert config.eos_token_ids == (2, 1, 3)
    assert config.sampling_defaults == {"temperature": 0.6, "top_k": 20}


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["<|call|>", "<|end|>", "<|return|>", "</s>", "turn"], (3, 4, 0, 2)),
        (["<|end|>", "a", "b", "</s>", "turn"], (3, 4, 0)),
    ],
)
def test_the_ends_of_a_turn_and_of_a_text_are_ends(tokens, ends, write):
    def text(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens + [f"t{n}" for n in range(92)])
        writer.add_eos_token_id(3)
        writer.add_eot_token_id(4)

    assert load_config(write(text=text)[0]).eos_token_ids == ends


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba' is not supported in a GGUF file; these"),
        (
            {"values": {"attention.causal": False}},
            r"llama\.attention\.causal False is not supported",
        ),
        (
            {"architecture": "qwen2", "values": {"attention.sliding_window": 16}},
            r"qwen2\.attention\.sliding_window 16 is not supported for this architecture",
        ),
        ({"values": {"attention.scale": 0.5}}, r"attention\.scale 0\.5 is not supported"),
        ({"values": {"embedding_scale": 2.0}}, r"embedding_scale 2\.0 is not supported"),
        (
            {"values": {"attention.temperature_scale": 0.1}},
            r"attention\.temperature_scale 0\.1\d* is not supported",
        ),
        ({"values": {"rope.scaling.type": "longrope"}}, "scaling.type 'longrope' is not supported"),
        ({"values": {"attention.value_length": 4}}, "value_length must be 8, as keys are long"),
        ({"values": {"attention.head_count_kv": [2, 2, 1]}}, "differs from layer to layer"),
        (
            {"values": {"block_count": "three"}},
            r"llama\.block_count must be an integer, got 'three'",
        ),
        ({"values": {"block_count": 4}}, r"it lacks 9 tensors: blk\.3\.attn_norm\.weight"),
        ({"values": {"block_count": 2}}, r"no use for 9 tensors: blk\.2\.attn_q\.weight"),
        (
            {"values": {"embedding_length": 64, "attention.key_length": 8}},
            r"tensor token_embd\.weight has shape \[97, 32\]; the config asks for \[97, 64\]",
        ),
        ({"extra": {"blk.0.odd": np.zeros(3, np.float32)}}, r"no use for 1 tensor: blk\.0\.odd"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(options, message, write, kernels):
    if options.get("architecture") == "mamba":
        path, _ = write()
        path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    else:
        path, _ = write(**options)
    with pytest.raises(ModelLoadError, match=message) as raised:
        _load(path, kernels)
    assert "m.gguf" in str(raised.value)


def test_a_kind_that_is_not_built_is_named(write):
    path, _ = write(kind=lambda name: Kind.BF16 if "ffn_up" in name else Kind.F32)
    data = path.read_bytes()
    at = data.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 16
    assert data[at] == Kind.BF16
    path.write_bytes(data[:at] + bytes([Kind.IQ3_S]) + data[at + 1 :])
    with pytest.raises(
        UnsupportedModelError, match=r"tensor blk\.1\.ffn_up\.weight is of kind IQ3_S.*Q4_K"
    ):
        load_config(path)
    columns = struct.pack("<Q", 31)  # of a kind whose blocks are 32 of them
    kind = bytes([Kind.Q8_0])
    path.write_bytes(data[: at - 16] + columns + data[at - 8 : at] + kind + data[at + 1 :])
    with pytest.raises(ModelLoadError, match=r"has rows that are no multiple of Q8_0's 32"):
        load_config(path)


def test_rows_of_a_tensor_are_those_of_the_whole(write):
    tensors = GgufTensors(*_read(write()[0]))
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight"):
        rows = tensors.read_rows(name, slice(2, 5))
        assert torch.equal(rows, tensors.read(name)[2:5])


def test_damaged_files_are_refused(write):
    path, _ = write()
    data = path.read_bytes()

    def refused(changed: bytes, message: str) -> None:
        other = path.with_name("damaged.gguf")
        other.write_bytes(changed)
        with pytest.raises(ModelLoadError, match=message) as raised:
            load_config(other)
        assert "damaged.gguf" in str(raised.value)

    refused(b"GGML" + data[4:], "is no GGUF file: it begins with b'GGML'")
    refused(data[:4] + struct.pack("<I", 1) + data[8:], "version 1 GGUF file, which is not")
    refused(data[:4] + struct.pack(">I", 3) + data[8:], "big-endian GGUF file")
    refused(data[:8] + struct.pack("<Q", 2**60) + data[16:], "damaged header: 11529")
    refused(data[:60], "damaged header")
    refused(
        data[: len(data) // 2],
        r"tensor \S+ \(\d+ bytes at \d+\) lies outside the file .*: download",
    )
    key = data.index(b"llama.context_length")
    refused(data[: key - 8] + struct.pack("<Q", 2**62) + data[key:], "lie outside the file")
    refused(data.replace(b"blk.1.ffn_up", b"blk.0.ffn_up"), "names a tensor twice")
    refused(b"", "cannot be mapped")
    path, _ = write(extra={"rope_freqs.weight": np.ones(4, np.float32)})
    refused(path.read_bytes()[:-24], r"rope_freqs\.weight lies outside the file")


def test_every_cut_of_a_header_is_an_error_of_ours(write):
    path, _ = write()
    data = path.read_bytes()
    header = data.index(b"blk.0.attn_q.weight")
    for size in range(1, header, 37):
        path.write_bytes(data[:size])
        with pytest.raises(ModelLoadError):
            load_config(path)
