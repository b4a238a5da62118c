"""Command lines and keywords that were written for vLLM: honoured, or refused by name."""

import json
import traceback
from pathlib import Path

import pytest

from streamserve.cli.args import build_parser, parse_args
from streamserve.cli.environment import unread_vllm_variables
from streamserve.cli.serve import api_config
from streamserve.cli.vllm_flags import FOREIGN_FLAGS, option
from streamserve.errors import ConfigError
from streamserve.llm.keywords import flags_of

NGRAM = '{"method": "ngram", "num_speculative_tokens": 2}'


def refused(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_args(["serve", *flags])
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--data-parallel-size", "2"],
            ["--data-parallel-size is not supported", "--tensor-parallel-size"],
        ),
        (["-dp", "2"], ["-dp is not supported", "--tensor-parallel-size"]),
        (["--fully-sharded-loras"], ["--fully-sharded-loras is not supported", "adapters"]),
        (["--no-enable-chunked-prefill"], ["--no-enable-chunked-prefill is not", "--itl-target"]),
        (["--cpu-offload-gb", "4"], ["--cpu-offload-gb is not supported", "--swap-space"]),
        (["--num-gpu-blocks-override", "9"], ["--kv-cache-memory"]),
        (["--speculative-model", "m"], ["--speculative-config"]),
        (["--uds", "/tmp/x"], ["--host and --port"]),
        (["--structured-outputs-config.backend", "xgrammar"], ["--structured-outputs-config is"]),
        (["--rope-scaling", "{}"], ["--rope-scaling is not supported", "--hf-overrides"]),
        (["--limit-mm-per-prompt", '{"image": 0, "video": 1}'], ["--limit-mm-per-prompt is not"]),
    ],
)
def test_what_is_not_built_is_refused_by_name_with_what_to_use_instead(capsys, flags, words):
    message = refused(capsys, *flags)
    for word in words:
        assert word in message


def test_values_that_ask_for_nothing_are_taken():
    given = ["--data-parallel-size", "1", "--enable-chunked-prefill", "--no-fully-sharded-loras"]
    given += ["--disable-log-stats", "--disable-custom-all-reduce", "--cpu-offload-gb", "0"]
    given += ["--worker-cls", "auto", "--distributed-executor-backend", "mp"]
    given += ["--guided-decoding-backend", "guidance"]
    given += ["-O3", "--limit-mm-per-prompt", "image=0,video=0", "--compilation-config", "3"]
    given += ["--limit-mm-per-prompt", '{"image": 0}', "-O.level=2"]
    args = parse_args(["serve", "a-model", *given])
    assert args.model == "a-model"
    assert not set(FOREIGN_FLAGS) & set(vars(args))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-c", "4096"], "-c is another server's: here it is --max-model-len;"),
        (["-hf", "owner/name"], "-hf is another server's: here it is MODEL;"),
        (["-m", "model.gguf"], "-m is another server's: here it is MODEL;"),
        (["-ngl", "99"], "-ngl is another server's: here it is --device;"),
        (["--max-total-tokens", "9"], "is another server's: here it is --max-model-len;"),
    ],
)
def test_a_flag_of_another_server_is_refused_with_its_name_here(capsys, flags, message):
    assert message in refused(capsys, *flags)


def test_a_flag_that_nobody_knows_is_taken_for_none_that_is_refused_or_far_from_it(capsys):
    for flag in ("--reload", "--rope-thetas", "--verbose"):
        assert "did you mean" not in refused(capsys, flag)
    assert "did you mean --tool-call-parser?" in refused(capsys, "--tool-parser", "hermes")


@pytest.mark.parametrize("name", ["STREAMSERVE_API_KEY", "VLLM_API_KEY"])
def test_a_key_of_the_environment_is_required_unless_a_flag_says_another(monkeypatch, name):
    monkeypatch.setenv(name, "secret")
    assert api_config(parse_args(["serve"])).api_keys == ("secret",)
    assert api_config(parse_args(["serve", "--api-key", "mine"])).api_keys == ("mine",)


def test_our_own_key_of_the_environment_comes_before_vllms(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    monkeypatch.setenv("STREAMSERVE_API_KEY", "ours")
    assert api_config(parse_args(["serve"])).api_keys == ("ours",)


def test_vllms_variables_that_say_nothing_here_are_known_by_name(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "read")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    assert unread_vllm_variables() == ["VLLM_CPU_KVCACHE_SPACE"]


def test_every_foreign_flag_is_known_to_serve_and_hidden_from_its_help():
    serve = build_parser().commands["serve"]
    known = set(serve._option_string_actions)
    text = serve.format_help()
    for name, flag in FOREIGN_FLAGS.items():
        assert option(name) in known
        assert flag.instead
    assert "--data-parallel-size" not in text


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--model", "m"], "model", "m"),
        (["m"], "model", "m"),
        ([], "model", None),
        (["--disable-log-requests"], "enable_log_requests", False),
        (["--enable-log-requests"], "enable_log_requests", True),
        (["--max-num-queued-reqs", "7"], "max_num_waiting", 7),
        (["--kv-cache-memory-bytes", "1GiB"], "kv_cache_memory", "1GiB"),
        (["--cudagraph-capture-sizes", "1", "2"], "cuda_graph_sizes", [1, 2]),
        (["--shutdown-timeout", "3"], "drain_timeout", 3.0),
        (["--no-enforce-eager"], "enforce_eager", False),
        (["--allowed-origins", '["a", "b"]'], "allowed_origins", ["a", "b"]),
        (["--allowed-origins", "a", "b"], "allowed_origins", ["a", "b"]),
        (["--hf-token"], "hf_token", True),
        (["--seed", "5"], "seed", 5),
        (["-sc", NGRAM], "speculative_config", NGRAM),
        (["--max-model-len", "32k"], "max_model_len", 32_000),
        (["--max-model-len", "32K"], "max_model_len", 32_768),
        (["--max-num-batched-tokens", "25.6k"], "max_num_batched_tokens", 25_600),
        (["--max_model_len", "4096"], "max_model_len", 4096),
        (["--served_model_name=my_model"], "served_model_name", ["my_model"]),
        (["--kv-cache-dtype", "fp8_e4m3"], "kv_cache_dtype", "fp8"),
        (["--load-format", "bitsandbytes"], "load_format", "auto"),
        (["--load-format", "runai_streamer"], "load_format", "safetensors"),
    ],
)
def test_vllms_spellings_mean_the_same(flags, name, value):
    assert getattr(parse_args(["serve", *flags]), name) == value


def test_keys_of_an_object_may_be_set_by_dots():
    flags = ["--hf-overrides.rope_theta", "5e5", "--hf_overrides.rope_scaling.rope_type=yarn"]
    flags += ["--default-chat-template-kwargs.enable_thinking", "false"]
    flags += ["--limit-mm-per-prompt.image", "0", "--port", "9"]
    args = parse_args(["serve", *flags, "--default-chat-template-kwargs.tools_in_user_message"])
    assert args.hf_overrides == {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn"}}
    variables = {"enable_thinking": False, "tools_in_user_message": True}
    assert (args.default_chat_template_kwargs, args.port) == (variables, 9)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--allowed-methods", "[1]"], "array of strings"),
        (["--override-generation-config", "{"], "must be JSON"),
        (["--override-generation-config", "[]"], "JSON object"),
        (["--max-log-len", "-1"], "at least 0"),
        (["--max-model-len", "1.0005k"], "must be a whole number, got '1.0005k'"),
        (["--max-model-len", "32kb"], "must be a whole number, got '32kb'"),
        (["--max-model-len", "0k"], "at least 1, got 0"),
        (["--gpu-memory-utilization", "nan"], "must be a number, got 'nan'"),
    ],
)
def test_a_wrong_value_is_named(capsys, flags, word):
    assert word in refused(capsys, *flags)


def test_a_config_file_gives_flags_that_the_command_line_overrides(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: from-file\nport: 9000\nmax_model_len: 128\nserved-model-name: [a, b]\n"
        "enable-prefix-caching: false\nenforce-eager: true\ndtype: null\n"
        'override-generation-config: {"temperature": 0.5}\n'
    )
    args = parse_args(["serve", "--config", str(file), "--port", "9001"])
    assert (args.model, args.port, args.max_model_len) == ("from-file", 9001, 128)
    assert (args.served_model_name, args.dtype) == (["a", "b"], "auto")
    assert not args.enable_prefix_caching
    assert args.enforce_eager
    assert args.override_generation_config == {"temperature": 0.5}
    assert parse_args(["serve", f"--config={file}", "mine"]).model == "mine"
    assert parse_args(["serve", f"--config={file}", "--model", "mine"]).model == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [("frobnicate: 1", "no flag --frobnicate"), ("- a", "settings by name"), ("a: [", "cannot be")],
)
def test_a_config_file_that_is_none(tmp_path, content, message):
    file = tmp_path / "serve.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_args(["serve", "--config", str(file)])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_model_len", "long", "^max_model_len: must be a whole number, got 'long'$"),
        ("itl_target_ms", [], "^itl_target_ms: must be a number"),
        ("enforce_eager", "yes", "^enforce_eager must be True or False, got 'yes'$"),
        ("tokenizer", 5, "^tokenizer must be a string, got 5$"),
        ("chat_template", {"a": 1}, "^chat_template must be a string"),
        ("kv_cache_memory", "many", "^kv_cache_memory: must look like 4GiB"),
        ("speculative_config", 3, "^speculative_config must be a string, got 3$"),
        ("pipeline_parallel_size", 2, "^pipeline_parallel_size is not supported by this server"),
    ],
)
def test_a_keyword_of_no_such_type_is_refused_by_name(name, value, message):
    with pytest.raises(ConfigError, match=message) as raised:
        flags_of(None, {name: value})
    shown = "".join(traceback.format_exception(raised.value))
    assert "argparse.ArgumentError" not in shown


def test_an_object_is_given_as_one():
    yarn = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    assert flags_of(None, {"hf_overrides": yarn}).hf_overrides == yarn


def test_a_model_is_a_name_or_a_path():
    assert flags_of(Path("a") / "b", {}).model == "a/b"
    with pytest.raises(ConfigError, match="model must be a string, got 5"):
        flags_of(5, {})


def test_keywords_are_the_flags():
    args = flags_of(
        "m",
        {
            "dtype": "float32",
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max_model_len": 64,
            "gpu_memory_utilization": 0.5,
            "swap_space": 4,
            "cuda_graph_sizes": [1, 2],
            "override_generation_config": {"top_p": 0.5},
            "speculative_config": json.loads(NGRAM),
            "revision": None,
            "quantization": None,
            "tokenizer_mode": "auto",
            "skip_tokenizer_init": False,
            "tensor_parallel_size": 1,
            "data_parallel_size": 1,
            "disable_log_stats": True,
            "reasoning_parser": "",
            "hf_overrides": None,
            "cpu_offload_gb": 0.0,
            "seed": 3,
        },
    )
    assert (args.model, args.dtype, args.max_model_len, args.seed) == ("m", "float32", 64, 3)
    assert (args.enforce_eager, args.enable_prefix_caching) == (True, False)
    assert (args.swap_space, args.cuda_graph_sizes) == ("4GiB", [1, 2])
    assert args.override_generation_config == {"top_p": 0.5}
    assert args.speculative_config == NGRAM


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dtype": "int3"}, "^dtype: invalid choice"),
        ({"max_model_len": 0}, "^max_model_len: must be at least 1, got 0"),
        ({"tensor_parallel_size": 0}, "^tensor_parallel_size: must be at least 1, got 0"),
        ({"quantization": "int3"}, "must be one of int8, int4, fp8, or what the checkpoint"),
        ({"skip_tokenizer_init": True}, "^skip_tokenizer_init is not supported .*got True"),
        (
            {"fully_sharded_loras": True},
            "^fully_sharded_loras is not supported by this server: adapters",
        ),
        ({"quantization_config": {"a": 1}}, "^quantization_config is not supported"),
        ({"served_model_name": "a"}, "^served_model_name is for `streamserve serve`"),
        ({"load_format": "tensorizer"}, "^load_format: invalid choice"),
    ],
)
def test_a_keyword_that_cannot_be_served_is_refused_by_name(keywords, message):
    with pytest.raises(ConfigError, match=message):
        flags_of(None, keywords)


def test_a_keyword_that_nobody_knows():
    with pytest.raises(TypeError, match="'frobnicate'"):
        flags_of(None, {"frobnicate": json})


def test_a_dotted_key_of_what_has_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"--hf-overrides\.a\.b: a has a value already"):
        parse_args(["serve", "--hf-overrides.a", "1", "--hf-overrides.a.b", "2"])
