"""The command line as a person meets it."""

import shutil
import signal
import socket
import subprocess

import pytest
import torch

from streamserve import __version__
from streamserve.cli import main
from streamserve.cli.args import build_parser
from streamserve.cli.model_source import box_path
from streamserve_kernels.huge_pages import zeros
from tests.e2e.servers import SMALL_FLAGS, command, environment, running_server


def test_version():
    """By itself, as a person calls it."""
    said = subprocess.check_output(command("--version"), text=True, env=environment())
    assert said == f"streamserve {__version__}\n"


def test_memory_that_the_system_refuses_is_said_in_one_line(monkeypatch, capsys):
    def serve(_args):
        zeros((2**46,), torch.uint8)

    monkeypatch.setattr("streamserve.cli.serve.run_serve", serve)
    assert main(["serve"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"streamserve: not enough memory: the system refuses {2**46} bytes: ")
    assert "--kv-cache-memory" in said


def test_help_names_every_flag(run):
    text = run("serve", "--help").stdout
    for flag in ("--host", "--port", "--dtype", "--max-model-len", "--gpu-memory-utilization"):
        assert flag in text
    assert "(default: 256 on a GPU, 64 on a CPU)" in " ".join(text.split())
    everything = run("--help").stdout
    assert "examples:" in everything
    bare = run()
    assert (bare.returncode, bare.stdout, bare.stderr) == (2, "", everything)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tensor-parallel-size", "3"], "must divide the model's 4 (attention heads), got 3"),
        (["--tensor-parallel-size", "2", "--enable-lora"], "--enable-lora must not be given with"),
        (["--quantization", "int3"], "must be one of int8, int4, fp8, or what the checkpoint is"),
        (["--quantization", "awq_marlin"], "--quantization awq_marlin: the checkpoint is not"),
        (["--gpu-memory-utilization", "1.5"], "at most 1, got 1.5"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "--device cuda:99 is not there: torch "),
        (["--device", "cpu", "--kv-cache-dtype", "fp8"], "--kv-cache-dtype must be auto on a CPU"),
        (["/nowhere/model"], "there is no such directory"),
        ([""], "MODEL must be a directory or a hub id, got ''"),
        (["--max-model-len", "1000000"], "1000000"),
        (["--kv-cache-memory", "100TiB"], "--kv-cache-memory"),
        (["--enable-auto-tool-choice"], "--enable-auto-tool-choice needs a --tool-call-parser"),
        (["--port", "70000"], "port must be between 0 and 65535, got 70000"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(run, args, message):
    result = run("serve", "--port", "0", *args)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--fully-sharded-loras"],
            "--fully-sharded-loras is not supported by this server: adapters",
        ),
        (["-pp", "4"], "-pp is not supported by this server: --tensor-parallel-size divides"),
        (["--kv-cache-memory", "many"], "must look like 4GiB, 512MiB or 2G, got 'many'"),
        (["--max-num-seqs", "some"], "argument --max-num-seqs: must be a whole number, got 'some'"),
        (["--max-model-length=9"], "--max-model-length=9 (did you mean --max-model-len?)"),
    ],
)
def test_what_is_no_flag_is_said_in_one_line_too(run, args, message):
    result = run("serve", *args)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr
    assert "`streamserve serve --help` lists the flags" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--chat-template", "{{ messages"], "the chat template of --chat-template cannot be read"),
        (["--chat-template", "none.jinja"], "--chat-template must be a file or one of"),
        (["--default-chat-template-kwargs", '{"tools": []}'], "must not hold 'tools'"),
        (["--shared-system-prompt", "none.txt"], "--shared-system-prompt none.txt cannot be used"),
        (["--enable-auto-tool-choice"], "--enable-auto-tool-choice needs a --tool-call-parser"),
        (["--override-generation-config", '{"temperature": 9}'], "temperature must be between"),
        ([], "holds no weights"),
    ],
)
def test_what_needs_no_weights_is_known_before_they_are_read(run, tmp_path, args, message):
    """With nothing wrong but the weights, which are not there, it is they that are missed."""
    for file in box_path().glob("*.json"):
        shutil.copy(file, tmp_path)
    result = run("serve", str(tmp_path), "--port", "0", "--dtype", "float32", *args)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert message in result.stderr


def test_template_variables_that_the_template_does_not_read_are_named(run, tmp_path):
    for file in box_path().glob("*.json"):
        shutil.copy(file, tmp_path)
    variables = '{"enable_thinking": false, "add_generation_prompt_": true}'
    result = run("serve", str(tmp_path), "--port", "0", "--default-chat-template-kwargs", variables)
    assert "does not read enable_thinking, add_generation_prompt_" in result.stderr


def test_a_config_file_and_a_certificate_that_are_none(run, tmp_path):
    result = run("serve", "--config", str(tmp_path / "none.yaml"))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "none.yaml cannot be read" in result.stderr
    result = run("serve", "--port", "0", "--ssl-certfile", str(tmp_path / "none.pem"))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "none.pem" in result.stderr
    assert "weights" not in result.stdout


def test_a_port_in_use_is_known_before_the_model_is_loaded(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("serve", "--port", str(taken.getsockname()[1]))
    assert result.returncode == 1
    assert "Address already in use" in result.stderr
    assert "weights" not in result.stdout


def test_the_memory_plan_and_a_line_to_try_are_printed(box):
    for words in ("weights", "KV blocks", "tokens", "chats of", "curl -N"):
        assert words in box.output


def test_what_has_no_effect_is_said_and_ctrl_c_ends_a_server_with_success(monkeypatch):
    """Also where a name has characters that the terminal lacks."""
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    flags = ("--gpu-memory-utilization", "0.9", "--enforce-eager", *SMALL_FLAGS)
    with running_server("--device", "cpu", *flags, "--served-model-name", "模型") as server:
        assert server.output.count("--gpu-memory-utilization has no effect on a CPU") == 1
        assert server.output.count("--enforce-eager has no effect on a CPU") == 1
        assert "ready in" in server.output
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=60) == 0


def test_chat_with_an_engine_of_its_own_whatever_the_terminal_can_say():
    """Bytes that are no text come in, and characters that the encoding lacks go out."""
    flags = [*SMALL_FLAGS, "--temperature", "0", "--max-tokens", "30"]
    result = subprocess.run(
        [*command("chat"), *flags, "--system", b"H\xf6flich"],
        input=b"What is the capital of France?\n/reset\nZ\xfcrich \xe4\xbd\xa0\n",
        capture_output=True,
        timeout=240,
        env={**environment(), "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"},
        check=False,
    )
    assert (result.returncode, b"Traceback" in result.stderr) == (0, False), result.stderr
    assert b"Paris" in result.stdout.splitlines()[0]
    assert len(result.stdout.split(b"Paris")[-1].strip()) > 2


def test_chat_against_a_server(run, box):
    lines = "My name is Anna.\nWhat is my name?\n/reset\n/exit\n"
    result = run("chat", "--url", box.url, "--temperature", "0", stdin=lines)
    assert result.returncode == 0, result.stderr
    assert "Anna" in result.stdout.splitlines()[1]


def test_chat_ends_quietly_when_nobody_reads_it(box):
    chat = subprocess.Popen(
        [*command("chat"), "--url", box.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert chat.stdout is not None
    chat.stdout.close()
    _, stderr = chat.communicate(b"Hi\nHi\n", timeout=240)
    assert (chat.returncode, stderr) == (0, b"")


def test_chat_says_what_is_wrong_with_its_flags_at_once(run):
    result = run("chat", "--temperature", "5", "/nowhere/model")
    assert result.returncode == 1
    assert "temperature must be between 0.0 and 2.0, got 5.0" in result.stderr


def test_chat_says_when_there_is_no_server(run):
    result = run("chat", "--url", "http://127.0.0.1:9", stdin="hi\n")
    assert result.returncode == 1
    assert "cannot reach http://127.0.0.1:9" in result.stderr


def test_flags_have_help():
    """A flag without a help text is one that a person must guess."""
    parsers = [build_parser()]
    while parsers:
        parser = parsers.pop()
        for action in parser._actions:
            if isinstance(action.choices, dict):
                parsers.extend(action.choices.values())
            elif action.dest != "help":
                assert action.help, action
