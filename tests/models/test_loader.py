"""Loading: file formats, what a checkpoint must and may hold, dtypes, and how models are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import (
    hub,
    kv_bytes_per_block,
    load_config,
    load_model,
    loader,
    resolve_dtype,
    resolve_model,
    supported_architectures,
)
from streamserve.models.checkpoint import RandomSource
from streamserve.models.config import NativeConfig
from streamserve.models.weights import build_weights
from tests.models.paged import PagedHarness, Sequence

CPU = torch.device("cpu")
TOKENS = [5, 17, 3, 88, 41]


@pytest.fixture
def load(kernels):
    def load(directory: Path, **options):
        options = {"dtype": torch.float32, "device": CPU, "kernels": kernels, **options}
        return load_model(directory, **options)

    return load


def logits_of(decoder) -> torch.Tensor:
    return PagedHarness(decoder).prefill([Sequence(TOKENS)], None)[0]


def assert_equal_to(decoder, model) -> None:
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits_of(decoder), expected, rtol=1e-4, atol=1e-4)


def edit_weights(directory: Path, edit) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(directory: Path, **changes) -> None:
    file = directory / "config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


class MakesAFile:
    """When it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestFormats:
    def test_sharded_safetensors(self, checkpoint, tiny_llama, load):
        directory, model = checkpoint(tiny_llama(), max_shard_size="20KB")
        assert len(list(directory.glob("*.safetensors"))) > 2
        assert_equal_to(load(directory), model)

    def test_shards_without_an_index(self, checkpoint, tiny_llama, load):
        directory, model = checkpoint(tiny_llama(), max_shard_size="20KB")
        (directory / "model.safetensors.index.json").unlink()
        (directory / "consolidated.safetensors").write_bytes(b"the same again, in other words")
        assert_equal_to(load(directory), model)

    def test_a_shard_that_is_not_there(self, checkpoint, tiny_llama, load):
        directory, _ = checkpoint(tiny_llama(), max_shard_size="20KB")
        lost = sorted(directory.glob("*.safetensors"))[1]
        lost.unlink()
        with pytest.raises(ModelLoadError, match=f"names {lost.name}, which is not there"):
            load(directory)

    def test_an_index_names_files_of_its_own_directory(self, checkpoint, tiny_llama, load):
        directory, _ = checkpoint(tiny_llama(), max_shard_size="20KB")
        index = directory / "model.safetensors.index.json"
        names = json.loads(index.read_text())["weight_map"]
        (directory.parent / "elsewhere.safetensors").touch()
        index.write_text(
            json.dumps({"weight_map": dict.fromkeys(names, "../elsewhere.safetensors")})
        )
        with pytest.raises(
            ModelLoadError, match=r"names elsewhere\.safetensors, which is not there"
        ):
            load(directory)

    def test_what_lies_beside_the_one_file_is_not_read(self, checkpoint, tiny_llama, load):
        directory, model = checkpoint(tiny_llama())
        (directory / "optimizer.safetensors").write_bytes(b"of no use")
        assert_equal_to(load(directory), model)

    @pytest.mark.parametrize("file_format", ["safetensors", "pt"])
    def test_a_tensor_in_two_files(self, checkpoint, tiny_llama, load, file_format):
        directory, _ = checkpoint(tiny_llama())
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        for n in range(2):
            if file_format == "pt":
                torch.save(tensors, directory / f"pytorch_model-{n}.bin")
            else:
                save_file(tensors, directory / f"model-{n}.safetensors")
        with pytest.raises(ModelLoadError, match=r"tensor \S+ is in (both|more than one file)"):
            load(directory)

    @pytest.mark.parametrize("way", ["zip", "before-torch-1.6", "in a state_dict"])
    def test_pytorch_bin(self, checkpoint, tiny_llama, load, way):
        directory, model = checkpoint(tiny_llama(tie_word_embeddings=True))
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # read twice
        if way == "in a state_dict":
            tensors = {"epoch": 3, "state_dict": tensors}
        file = directory / "pytorch_model.bin"
        torch.save(tensors, file, _use_new_zipfile_serialization=way != "before-torch-1.6")
        assert_equal_to(load(directory), model)
        with pytest.raises(ModelLoadError, match=r"looked for \*\.safetensors$"):
            load(directory, load_format="safetensors")

    def test_sharded_pytorch_bin(self, checkpoint, tiny_llama, load):
        directory, model = checkpoint(tiny_llama())
        tensors = list(load_file(directory / "model.safetensors").items())
        weight_map = {}
        for shard in (0, 1):
            part = dict(tensors[shard::2])
            name = f"pytorch_model-0000{shard + 1}-of-00002.bin"
            torch.save(part, directory / name)
            weight_map.update(dict.fromkeys(part, name))
        index = directory / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert_equal_to(load(directory, load_format="pt"), model)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_pickle_that_runs_code_is_refused(self, checkpoint, tiny_llama, load, zipped):
        directory, _ = checkpoint(tiny_llama())
        (directory / "model.safetensors").unlink()
        weights = {"weight": MakesAFile(directory / "made")}
        file = directory / "pytorch_model.bin"
        torch.save(weights, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ModelLoadError, match="cannot be loaded as plain tensors"):
            load(directory)
        assert not (directory / "made").exists()
        torch.load(file, weights_only=False)
        assert (directory / "made").exists(), "as it was meant to"

    def test_no_weights_at_all(self, checkpoint, tiny_llama, load):
        directory, _ = checkpoint(tiny_llama())
        (directory / "model.safetensors").unlink()
        with pytest.raises(ModelLoadError, match=r"\*\.safetensors or pytorch_model\*\.bin"):
            load(directory)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda data: data[:4], "no safetensors file"),
            (lambda data: b"\xff" * 8 + data[8:], "no safetensors file: a header of"),
            (lambda data: data[:-100], r"lies outside the file .*: download it again"),
            (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
            (lambda data: data[:8] + b"!" + data[9:], "damaged header"),
            (lambda data: data.replace(b'"F32"', b'"F64"', 1), "bytes, shape .* in F64 needs"),
        ],
        ids=["short", "huge-header", "truncated", "pointer", "no-json", "no-such-shape"],
    )
    def test_damaged_safetensors(self, checkpoint, tiny_llama, load, damage, message):
        directory, _ = checkpoint(tiny_llama())
        file = directory / "model.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(ModelLoadError, match=message):
            load(directory)

    def test_dummy_weights_need_a_config_only(self, checkpoint, tiny_llama, load, kernels):
        directory, _ = checkpoint(tiny_llama())
        (directory / "model.safetensors").unlink()
        first, again, other = (
            logits_of(load(directory, load_format="dummy", seed=seed)) for seed in (1, 1, 2)
        )
        assert first.isfinite().all()
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        weights = build_weights(
            load_config(directory).spec, RandomSource(), kernels, torch.float32, CPU
        )
        norms = [norm.weight for norm in weights.layers[0].norms.values()]
        assert norms
        assert all((norm == 1.0).all() for norm in norms)

    def test_an_unknown_format(self, checkpoint, tiny_llama, load):
        directory, _ = checkpoint(tiny_llama())
        with pytest.raises(ModelLoadError, match="'ggml' is unknown; these are: auto, safetensors"):
            load(directory, load_format="ggml")


class TestTensors:
    def test_missing_and_surplus_tensors_are_named(self, checkpoint, tiny_llama, load):
        directory, _ = checkpoint(tiny_llama())

        def edit(tensors):
            tensors["model.layers.1.mlp.wide.weight"] = tensors.pop(
                "model.layers.1.mlp.up_proj.weight"
            )

        edit_weights(directory, edit)
        with pytest.raises(
            ModelLoadError,
            match=r"lacks 1 tensor: model\.layers\.1\.mlp\.up_proj\.weight; "
            r"it has no use for 1 tensor: model\.layers\.1\.mlp\.wide\.weight",
        ):
            load(directory)

    def test_a_layer_too_many_is_surplus(self, checkpoint, tiny_llama, load):
        directory, _ = checkpoint(tiny_llama())
        edit_config(directory, num_hidden_layers=1)
        with pytest.raises(ModelLoadError, match=r"no use for 9 tensors: .* and 1 more"):
            load(directory)

    def test_a_wrong_shape(self, checkpoint, tiny_llama, load):
        directory, _ = checkpoint(tiny_llama())
        edit_config(directory, intermediate_size=40)
        with pytest.raises(
            ModelLoadError, match=r"gate_proj\.weight has shape \[48, 32\]; .* asks for \[40, 32\]"
        ):
            load(directory)

    def test_buffers_of_old_checkpoints_are_passed_over(self, checkpoint, tiny_llama, load):
        directory, model = checkpoint(tiny_llama())

        def edit(tensors):
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

        edit_weights(directory, edit)
        assert_equal_to(load(directory), model)
        name = "model.layers.0.self_attn.rotary_emb.inv_freq_scale"
        edit_weights(directory, lambda t: t.update({name: torch.ones(1)}))
        with pytest.raises(ModelLoadError, match=f"no use for 1 tensor: {name}"):
            load(directory)

    @pytest.mark.parametrize("tied", [True, False])
    def test_gpt2_as_it_was_first_published(self, checkpoint, load, tied):
        """Without the prefix, with the causal mask as a buffer."""
        config = transformers.GPT2Config(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
        config.tie_word_embeddings = tied
        directory, model = checkpoint(config)

        def edit(tensors):
            for name in list(tensors):
                tensors[name.removeprefix("transformer.")] = tensors.pop(name)
            for layer in range(2):
                tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)

        edit_weights(directory, edit)
        assert_equal_to(load(directory), model)

    def test_a_tied_head_saved_all_the_same(self, checkpoint, tiny_llama, load):
        directory, model = checkpoint(tiny_llama(tie_word_embeddings=True))
        embedding = model.get_input_embeddings().weight.detach()
        edit_weights(directory, lambda t: t.update({"lm_head.weight": embedding.clone()}))
        assert_equal_to(load(directory), model)
        edit_weights(directory, lambda t: t.update({"lm_head.weight": embedding + 1}))
        with pytest.raises(ModelLoadError, match=r"lm_head\.weight differs from model\.embed"):
            load(directory)

    def test_an_untied_head_that_is_not_there(self, checkpoint, tiny_llama, load):
        directory, _ = checkpoint(tiny_llama(tie_word_embeddings=True))
        edit_config(directory, tie_word_embeddings=False)
        with pytest.raises(ModelLoadError, match=r"lacks 1 tensor: lm_head\.weight"):
            load(directory)

    def test_quantised_tensors(self, checkpoint, tiny_llama, load):
        directory, _ = checkpoint(tiny_llama())
        name = "model.layers.0.mlp.down_proj.weight"
        edit_weights(directory, lambda t: t.update({name: t[name].to(torch.int8)}))
        with pytest.raises(ModelLoadError, match=f"{name} has dtype torch.int8"):
            load(directory)

    def test_progress_reaches_the_whole(self, checkpoint, tiny_llama, load):
        directory, _ = checkpoint(tiny_llama())
        seen = []
        decoder = load(directory, progress=lambda done, total: seen.append((done, total)))
        assert seen == sorted(seen)
        total = load_config(directory).weight_bytes(torch.float32)
        assert seen[-1] == (total, total)
        assert decoder.nbytes == total

    def test_a_tied_head_takes_no_memory_where_it_is_not_packed(self, checkpoint, tiny_llama, load):
        directory, model = checkpoint(tiny_llama(tie_word_embeddings=True))
        parameters = sum(parameter.nbytes for parameter in model.parameters())
        assert load(directory).nbytes == parameters
        planned = load_config(directory).weight_bytes(torch.float32)
        assert planned == parameters + model.get_input_embeddings().weight.nbytes

    def test_bfloat16_stays_close(self, checkpoint, tiny_llama, load):
        directory, model = checkpoint(tiny_llama())
        decoder = load(directory, dtype=torch.bfloat16)
        with torch.inference_mode():
            expected = model.to(torch.bfloat16)(torch.tensor([TOKENS])).logits[0].float()
        logits = logits_of(decoder)
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


class TestConfig:
    def test_what_a_config_says(self, checkpoint, tiny_llama):
        directory, _ = checkpoint(tiny_llama(eos_token_id=[7, 8]))
        config = load_config(directory)
        assert config.architecture == "LlamaForCausalLM"
        assert (config.vocab_size, config.max_position_embeddings) == (97, 128)
        assert config.eos_token_ids == (7, 8)
        assert config.dtype == torch.float32
        # 2 layers of keys and values, 2 heads of 8, 16 tokens, 2 bytes.
        assert kv_bytes_per_block(config.spec, 16, torch.bfloat16) == 2 * 2 * 2 * 8 * 16 * 2

    def test_generation_config_comes_first(self, checkpoint, tiny_llama):
        directory, _ = checkpoint(tiny_llama())
        (directory / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [3, 4], "temperature": 0, "top_k": 20, "top_p": None})
        )
        edit_config(directory, dtype="torch.float16")
        config = load_config(directory)
        assert config.eos_token_ids == (3, 4)
        assert config.sampling_defaults == {"temperature": 0, "top_k": 20}
        assert config.dtype == torch.float16

    @pytest.mark.parametrize(
        ("file", "overrides", "same"),
        [
            (
                {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
                {"rope_scaling": YARN},
                {"rope_parameters": {"rope_theta": 5e5, **YARN}},
            ),
            (
                {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
                {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 7e5},
                {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e5}},
            ),
            (
                {"rope_parameters": None, "rope_theta": 5e5},
                {"rope_scaling": YARN, "max_position_embeddings": 512},
                {
                    "rope_parameters": {"rope_theta": 5e5, **YARN},
                    "max_position_embeddings": 512,
                },
            ),
        ],
    )
    def test_values_are_overridden_as_if_the_file_held_them(
        self, checkpoint, tiny_llama, file, overrides, same
    ):
        directory, _ = checkpoint(tiny_llama())
        edit_config(directory, **file)
        config = load_config(directory, hf_overrides=overrides)
        assert config.spec != load_config(directory).spec
        edit_config(directory, **same)
        held = load_config(directory)
        assert (config.spec, config.max_position_embeddings) == (
            held.spec,
            held.max_position_embeddings,
        )

    def test_values_that_another_reader_would_need_are_not_overridden(self, checkpoint, tiny_llama):
        directory, _ = checkpoint(tiny_llama())
        with pytest.raises(UnsupportedModelError, match="--hf-overrides is for the native"):
            load_config(directory, model_impl="transformers", hf_overrides={"rope_theta": 5e5})

    @pytest.mark.parametrize(
        ("rope", "longest"),
        [
            ({"rope_type": "default"}, 128),
            ({"rope_type": "linear", "factor": 4.0}, 512),
            ({"rope_type": "dynamic", "factor": 2.0}, 256),
            ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
            (
                {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
                128,
            ),
        ],
        ids=lambda value: value["rope_type"] if isinstance(value, dict) else None,
    )
    def test_the_longest_sequence_counts_the_stretch(self, checkpoint, tiny_llama, rope, longest):
        directory, _ = checkpoint(tiny_llama())
        edit_config(directory, rope_parameters={"rope_theta": 1e4, **rope})
        config = load_config(directory)
        assert config.max_position_embeddings == longest
        assert config.resolve_max_model_len(None) == longest
        assert config.resolve_max_model_len(100) == 100
        with pytest.raises(ModelLoadError, match=f"{longest + 1} must be between 1 and {longest}"):
            config.resolve_max_model_len(longest + 1)

    def test_an_unknown_architecture_is_refused_with_the_list(self, checkpoint, tiny_llama):
        directory, _ = checkpoint(tiny_llama())
        edit_config(directory, architectures=["MambaForCausalLM"])
        with pytest.raises(UnsupportedModelError, match="MambaForCausalLM is not") as caught:
            load_config(directory)
        for architecture in supported_architectures():
            assert architecture in str(caught.value)

    def test_a_config_without_architectures_goes_by_its_model_type(self, checkpoint, tiny_llama):
        directory, _ = checkpoint(tiny_llama())
        edit_config(directory, architectures=...)
        assert load_config(directory).architecture == "LlamaForCausalLM"
        edit_config(directory, model_type="mamba")
        with pytest.raises(UnsupportedModelError, match="model_type 'mamba'"):
            load_config(directory)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            (
                {"quantization_config": {"quant_method": "hqq"}},
                UnsupportedModelError,
                "quant_method 'hqq'",
            ),
            ({"hidden_size": ...}, ModelLoadError, "lacks hidden_size"),
            ({"num_hidden_layers": "two"}, ModelLoadError, "at least 1, got 'two'"),
            ({"num_key_value_heads": 3}, ModelLoadError, "4 attention heads cannot share 3"),
            ({"tie_word_embeddings": 1}, ModelLoadError, "must be true or false, got 1"),
        ],
    )
    def test_values_that_cannot_be_served(self, checkpoint, tiny_llama, changes, error, message):
        directory, _ = checkpoint(tiny_llama())
        edit_config(directory, **changes)
        with pytest.raises(error, match=message):
            load_config(directory)

    def test_what_the_family_refuses_transformers_may_have(self, checkpoint, tiny_llama, caplog):
        directory, _ = checkpoint(tiny_llama())
        edit_config(directory, hidden_act="mish")
        with pytest.raises(UnsupportedModelError, match="hidden_act 'mish' is not supported"):
            load_config(directory, model_impl="native")
        assert not isinstance(load_config(directory), NativeConfig)
        [said] = [record.getMessage() for record in caplog.records]
        assert "hidden_act 'mish' is not supported" in said
        assert said.endswith("so the model runs through transformers")
        edit_config(directory, hidden_act="no such")
        with pytest.raises(UnsupportedModelError, match="hidden_act 'no such' is not supported"):
            load_config(directory)

    def test_a_directory_without_a_config(self, tmp_path):
        with pytest.raises(ModelLoadError, match=r"config\.json is not there"):
            load_config(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ModelLoadError, match="is no JSON"):
            load_config(tmp_path)


class TestResolve:
    def test_a_directory_is_itself(self, tmp_path):
        assert resolve_model(str(tmp_path)) == tmp_path

    @pytest.mark.parametrize("model", ["/no/such/model", "./model", "a/b/c"])
    def test_what_is_no_hub_id_is_only_looked_for_here(self, model):
        with pytest.raises(ModelLoadError, match=f"{model!r}: there is no such directory"):
            resolve_model(model)

    def test_a_hub_model_comes_from_the_cache(self, tmp_path):
        snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (snapshot / "model.safetensors").write_bytes(b"")
        refs = tmp_path / "models--owner--name" / "refs"
        refs.mkdir()
        (refs / "main").write_text("0" * 40)
        found = resolve_model("owner/name", cache_dir=tmp_path, local_files_only=True)
        assert found == snapshot

    @pytest.mark.parametrize(
        ("load_format", "with_code", "has", "asked"),
        [
            ("auto", False, "model.safetensors", ["*.safetensors*"]),
            ("auto", False, "pytorch_model.bin", ["*.safetensors*", "pytorch_model*.bin*"]),
            ("pt", False, "model.safetensors", ["pytorch_model*.bin*"]),
            ("dummy", False, "config.json", []),
            ("safetensors", True, "model.safetensors", ["*.py", "*.safetensors*"]),
        ],
    )
    def test_no_more_is_downloaded_than_is_read(self, tmp_path, load_format, with_code, has, asked):
        found: list[str] = []

        def download(*patterns: str) -> Path:
            found.extend(pattern for pattern in patterns if pattern not in hub._HUB_FILES)
            (tmp_path / has).touch()
            return tmp_path

        assert hub._directory(download, load_format, with_code=with_code) == tmp_path
        assert found == asked

    def test_a_hub_model_that_cannot_be_had_says_what_was_tried(self, tmp_path):
        with pytest.raises(ModelLoadError, match=r"no such directory .*, and the hub did not give"):
            resolve_model("owner/name", cache_dir=tmp_path, local_files_only=True)

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("float32", torch.float32),
            ("float", torch.float32),
            ("bfloat16", torch.bfloat16),
            ("float16", torch.float16),
            ("half", torch.float16),
        ],
    )
    def test_dtypes_by_name(self, checkpoint, tiny_llama, name, dtype):
        config = load_config(checkpoint(tiny_llama())[0])
        assert resolve_dtype(name, config, CPU) == dtype

    @pytest.mark.parametrize(
        ("multiplies", "compiled", "dtype"),
        [
            (True, False, torch.bfloat16),
            (False, True, torch.bfloat16),
            (False, False, torch.float32),
        ],
    )
    def test_auto_dtype(self, checkpoint, tiny_llama, monkeypatch, multiplies, compiled, dtype):
        monkeypatch.setattr(loader, "cpu_multiplies_bfloat16", lambda: multiplies)
        monkeypatch.setattr(loader, "bfloat16_pays", lambda sizes: compiled and sizes == ((8, 8),))
        config = load_config(checkpoint(tiny_llama())[0])
        assert resolve_dtype("auto", config, CPU) == dtype
        assert resolve_dtype("auto", config, torch.device("cuda")) == torch.bfloat16
        with pytest.raises(ModelLoadError, match="'int8' is unknown; these are: auto, float32"):
            resolve_dtype("int8", config, CPU)
