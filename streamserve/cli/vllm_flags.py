"""Flags that vLLM has and this server has not: refused by name, with what to use instead.

A value that asks for nothing (``--data-parallel-size 1``) is taken in silence, so that command
lines and scripts move over as they are. `LLM` refuses its keywords by the same table.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_DEVICES = "--tensor-parallel-size divides a model among devices of one machine, in one way"
_MULTIMODAL = "models here read and write text only"
_LORA = "adapters are loaded in one way, beside the linear layers"
_SPECULATION = "--speculative-config drafts tokens: docs/speculation.md"
_STATES = (
    "states are float32 and inputs of convolutions the model's, kept where prompts part or end"
)
_KERNELS = "kernels are chosen by the device and the dtype, in one way"
_OFFLOAD = "weights stay on the device; --swap-space keeps KV blocks of a GPU in host memory"
_METRICS = "GET /metrics has what is measured"
_LOGS = "--enable-log-requests logs requests; the rest is in GET /metrics"
_SCHEDULER = "--itl-target-ms and --max-num-batched-tokens shape a step"
_PLUGIN = "no code of yours is loaded into the server"

# A name alone takes a value; `name=a|b` lists values that ask for nothing, `=*` says that all do.
# `name!` is a switch that may be off, `name!=true` one that may be on.
_GROUPS: tuple[tuple[str, str], ...] = (
    (
        _DEVICES,
        "pipeline_parallel_size=1 data_parallel_size=1 data_parallel_rank=0 "
        "data_parallel_start_rank=0 data_parallel_size_local=1 data_parallel_address "
        "data_parallel_rpc_port "
        "data_parallel_backend=* data_parallel_hybrid_lb! data_parallel_external_lb! "
        "data_parallel_multi_port_external_lb! data_parallel_supervisor_port "
        "dp_supervisor_probe_interval_s=* dp_supervisor_probe_timeout_s=* "
        "dp_supervisor_probe_failure_threshold=* dp_sync_interval=* enable_expert_parallel! "
        "enable_hc_sp! enable_batch_sharded_sampling! enable_ep_weight_filter! all2all_backend=* "
        "enable_dbo! ubatch_size=0 dbo_decode_token_threshold=* dbo_prefill_token_threshold=* "
        "disable_nccl_for_dp_synchronization!=* enable_eplb! eplb_config "
        "expert_placement_strategy=* enable_elastic_ep! elastic_ep_max_dp_size "
        "decode_context_parallel_size=1 prefill_context_parallel_size=1 dcp_comm_backend=* "
        "dcp_q_replicate! dcp_kv_cache_interleave_size=1 cp_kv_cache_interleave_size=1 nnodes=1 "
        "node_rank=0 master_addr=* master_port=* distributed_timeout_seconds=* "
        "cpu_distributed_timeout_seconds=* distributed_executor_backend=mp|uni "
        "disable_custom_all_reduce!=* ray_workers_use_nsight! worker_use_ray! numa_bind! "
        "numa_bind_nodes numa_bind_cpus enable_shm_tensor_arena! enable_nccl_comm_suspend! "
        "enable_fault_tolerance! fault_tolerance_config enable_scale_out! headless! "
        "api_server_count=1",
    ),
    ("--device cuda:N picks a GPU", "device_ids"),
    (
        _MULTIMODAL,
        "allowed_local_media_path allowed_media_domains limit_mm_per_prompt=0 enable_mm_embeds! "
        "media_io_kwargs mm_processor_kwargs mm_processor_cache_gb=* mm_processor_cache_type=* "
        "mm_hasher_algorithm=* mm_shm_cache_max_object_size_mb=* mm_encoder_only! "
        "mm_encoder_tp_mode=* mm_encoder_attn_backend mm_encoder_attn_dtype "
        "mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin "
        "interleave_mm_strings! skip_mm_profiling!=* video_pruning_rate video_pruning_method=* "
        "mm_tensor_ipc=* mm_processor_device mm_ipc_gpu_memory_gb mm_device_do_normalize! "
        "disable_chunked_mm_input!=* default_mm_loras language_model_only!=* "
        "trust_request_mm_kwargs! disable_mm_preprocessor_cache!=* enable_mm_processor_stats!",
    ),
    (
        _LORA,
        "lora_dtype=* fully_sharded_loras! lora_target_modules enable_tower_connector_lora! "
        "specialize_active_lora! enable_mixed_moe_lora_format! enable_moe_shared_loras! "
        "max_lora_cls_labels enable_prompt_adapter! lora_extra_vocab_size=*",
    ),
    (
        _SPECULATION,
        "speculative_model num_speculative_tokens diffusion_config per_request_spec_decode_metrics",
    ),
    (
        _STATES,
        "mamba_backend=* mamba_ssu_algorithm=* enable_mamba_cache_stochastic_rounding! "
        "mamba_cache_philox_rounds=* mamba_cache_dtype=auto mamba_ssm_cache_dtype=auto|float32 "
        "mamba_block_size=* mamba_cache_mode=* enable_mamba_shared_prefix_checkpoint! "
        "replayssm_buffer_len=* use_replayssm! gdn_prefill_backend=* kda_prefill_backend=* "
        "kda_decode_backend=* mamba_config swa_bounded_replay! prefix_match_unit=*",
    ),
    (
        _KERNELS,
        "attention_backend attention_config moe_backend=auto linear_backend=auto "
        "sparse_indexer_topk_backend=auto ir_op_priority enable_flashinfer_autotune! kernel_config "
        "use_fp64_gumbel! model_class_overrides optimization_level=* "
        "performance_mode=balanced jit_monitor_mode=off jit_monitor_verbose! engram_config",
    ),
    (
        "--cuda-graph-sizes and --enforce-eager say what is recorded; nothing else is compiled",
        "compilation_config=0|1|2|3 max_cudagraph_capture_size max_seq_len_to_capture=*",
    ),
    (
        _OFFLOAD,
        "offload_backend=auto cpu_offload_gb=0 cpu_offload_params offload_group_size=0 "
        "offload_num_in_group=1 offload_prefetch_step=1 offload_params kv_offloading_size "
        "kv_offloading_backend kv_transfer_config kv_events_config ec_transfer_config "
        "ec_manager_config",
    ),
    (
        _METRICS,
        "show_hidden_metrics_for_version collect_detailed_traces "
        "kv_cache_metrics! kv_cache_metrics_sample custom_histogram_buckets cudagraph_metrics! "
        "enable_layerwise_nvtx_tracing! enable_mfu_metrics! enable_per_request_metrics! "
        "enable_server_load_tracking! profiler_config",
    ),
    (
        _LOGS,
        "enable_log_outputs! enable_log_deltas! enable_logging_iteration_details! "
        "logging_config log_config_file log_level log_error_stack! "
        "disable_access_log_for_endpoints=* disable_log_stats!=* aggregate_engine_logging!=* "
        "disable_uvicorn_access_log!=true",
    ),
    (
        _SCHEDULER,
        "max_num_scheduled_tokens max_num_active_seqs "
        "long_prefill_token_threshold=0 long_prefill_token_threshold_adaptive! "
        "max_num_partial_prefills=1 max_long_partial_prefills=1 enable_chunked_prefill!=true "
        "scheduler_cls scheduler_reserve_full_isl!=* watermark=0 prefill_schedule_interval=1 "
        "disable_hybrid_kv_cache_manager!=* stream_interval=1 num_scheduler_steps=1 "
        "multi_step_stream_outputs!=* preemption_mode=recompute scheduler_delay_factor=0 "
        "use_v2_block_manager!=* disable_async_output_proc!",
    ),
    (
        "--kv-cache-memory says how large the KV cache is",
        "num_gpu_blocks_override num_cpu_blocks_override",
    ),
    (
        "the KV cache has one layout: --kv-cache-dtype is its dtype",
        "kv_cache_dtype_skip_layers kv_sharing_fast_prefill! prefix_caching_hash_algo=sha256 "
        "prefix_cache_retention_interval disable_sliding_window!",
    ),
    (
        _PLUGIN,
        "middleware logits_processors io_processor_plugin worker_cls=auto worker_extension_cls "
        "tool_parser_plugin reasoning_parser_plugin additional_config weight_transfer_config "
        "aux_output_config tool_server",
    ),
    (
        "checkpoints are read as they are: a directory's own config.json counts",
        "hf_config_path config_format=auto|hf quantization_config "
        "allow_deprecated_quantization! quantization_param_path model_loader_extra_config "
        "ignore_patterns safetensors_load_strategy=* safetensors_prefetch_num_threads=* "
        "safetensors_prefetch_block_size=* pt_load_map_location=cpu use_tqdm_on_load!=* "
        "max_parallel_loading_workers=* model_weights",
    ),
    (
        """--hf-overrides '{"rope_scaling": {…}, "rope_theta": …}' says it""",
        "rope_scaling rope_theta",
    ),
    (
        "code of a checkpoint, which only --trust-remote-code runs, is that of --revision",
        "code_revision",
    ),
    (
        "the server tokenises, and takes token ids in /v1/completions as well",
        "skip_tokenizer_init! tokens_only! tokenizer_pool_size=0 tokenizer_pool_type=* "
        "tokenizer_pool_extra_config renderer_num_workers=1",
    ),
    (
        "every model generates and embeds; --pooling says how, classes and scores are not built",
        "runner=auto|generate|pooling convert=auto|none|embed task=auto|generate|embed|embedding "
        "pooler_config override_pooler_config enable_flash_late_interaction!",
    ),
    (
        "requests carry token ids or text",
        "enable_prompt_embeds! enable_return_routed_experts! return_sampling_mask! "
        "enable_trace_replay! watermark_config",
    ),
    (
        "the API reports at most 20 alternatives, of the model's own distribution",
        "max_logprobs=5|20 logprobs_mode=raw_logprobs",
    ),
    (
        "a model stays in memory until the process ends",
        "enable_sleep_mode! sleep_mode_offload_cudagraph! sleep_preserve_parameter_names "
        "enable_cumem_allocator!",
    ),
    (
        "structured output has one backend and its settings are the request's",
        "structured_outputs_config guided_decoding_backend=auto|guidance reasoning_config",
    ),
    (
        "the server speaks HTTP over TCP: --host and --port",
        "uds grpc! grpc_port=* h11_max_header_count=*",
    ),
    (
        "/docs and /openapi.json need no network as they are",
        "enable_offline_docs! enable_tokenizer_info_endpoint!",
    ),
    (
        "the chat template's format is found by trying it",
        "chat_template_content_format=auto",
    ),
    (
        "the request says it: stream_options.include_usage",
        "enable_force_include_usage!",
    ),
    (
        "--tool-call-parser says how the model writes calls",
        "exclude_tools_when_tool_choice_none!=* tool_strict_level",
    ),
    (
        "--reasoning-parser says how the model writes what it thinks",
        "enable_reasoning!=true anthropic_disabled_thinking_effort "
        "cohere_is_reasoning_model! cohere_format",
    ),
    (
        "the field is a request's: return_tokens_as_token_ids",
        "return_tokens_as_token_ids!",
    ),
    (
        "answers carry these always",
        "enable_prompt_tokens_details!=true enable_request_id_headers!=true "
        "fingerprint_mode fingerprint_value",
    ),
    (
        "certificates are read once, when the server starts",
        "enable_ssl_refresh!",
    ),
    (
        "of vLLM's environment variables only VLLM_API_KEY is read",
        "fail_on_environ_validation!=*",
    ),
)

_SHORT = {
    "pipeline_parallel_size": "-pp",
    "data_parallel_size": "-dp",
    "data_parallel_rank": "-dpn",
    "data_parallel_start_rank": "-dpr",
    "data_parallel_size_local": "-dpl",
    "data_parallel_address": "-dpa",
    "data_parallel_rpc_port": "-dpp",
    "data_parallel_backend": "-dpb",
    "data_parallel_hybrid_lb": "-dph",
    "data_parallel_external_lb": "-dpe",
    "enable_expert_parallel": "-ep",
    "decode_context_parallel_size": "-dcp",
    "prefill_context_parallel_size": "-pcp",
    "nnodes": "-n",
    "node_rank": "-r",
    "api_server_count": "-asc",
    "diffusion_config": "-dc",
    "compilation_config": "-cc",
    "optimization_level": "-O",
    "attention_config": "-ac",
}


@dataclass(frozen=True, slots=True)
class ForeignFlag:
    """A flag of vLLM's. ``neutral``: the values that ask for nothing; ``None``: all of them."""

    name: str
    instead: str
    neutral: frozenset[str] | None
    is_switch: bool

    def refusal(self, value: Any) -> str | None:
        """Why ``value`` is refused, and what to use instead; ``None`` if it asks for nothing."""
        if value is None or self.neutral is None or _text(value) in self.neutral:
            return None
        return f"is not supported by this server: {self.instead}"


_ZEROS = re.compile(r'\{?(?:\s*"?\w+"?\s*[:=]\s*0\s*,?)+\}?')
"""``image=0,video=0``, or the same in JSON."""


def _text(value: Any) -> str:
    """As it stands in the table: a flag's text, or how a keyword's value would be written.

    Zeros by name are 0.
    """
    if isinstance(value, Mapping):
        value = json.dumps(value, default=str)
    if isinstance(value, str):
        return "0" if _ZEROS.fullmatch(value) else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, default=str)


def _flags() -> dict[str, ForeignFlag]:
    flags = {}
    for instead, entries in _GROUPS:
        for entry in entries.split():
            name, _, values = entry.partition("=")
            is_switch = name.endswith("!")
            neutral = frozenset(values.split("|")) - {""}
            if is_switch and not values:
                neutral = frozenset({"false"})
            name = name.rstrip("!")
            flags[name] = ForeignFlag(
                name, instead, None if values == "*" else neutral, is_switch=is_switch
            )
    return flags


FOREIGN_FLAGS = _flags()
"""By their names in Python."""


def option(name: str) -> str:
    """A flag as it is written on a command line."""
    return "--" + name.replace("_", "-")


def add_foreign_flags(parser: argparse.ArgumentParser) -> None:
    """Let ``parser`` know them all, except those that it has an own meaning for."""
    for flag in FOREIGN_FLAGS.values():
        names = [option(flag.name)]
        if flag.is_switch:
            names.append(option(f"no_{flag.name}"))
        if flag.name in _SHORT:
            names.append(_SHORT[flag.name])
        try:
            parser.add_argument(*names, action=RefuseAction, flag=flag)
        except argparse.ArgumentError:  # it is one of ours by now
            continue


class RefuseAction(argparse.Action):
    """What the command line does with one of them."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, flag: ForeignFlag) -> None:
        super().__init__(
            option_strings,
            argparse.SUPPRESS,
            nargs=0 if flag.is_switch else None,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
        self.flag = flag

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = option_string or option(self.flag.name)
        value = not given.startswith("--no-") if self.flag.is_switch else values
        refusal = self.flag.refusal(value)
        if refusal is not None:
            parser.error(f"{given} {refusal}")
