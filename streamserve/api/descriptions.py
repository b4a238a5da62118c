"""What request fields mean, in a line each, for the pages that list them."""

from __future__ import annotations

DESCRIPTIONS: dict[str, str] = {
    "add_generation_prompt": "Open the assistant's turn at the end of the prompt (chat: true).",
    "add_special_tokens": "Let the tokenizer add its own (default: true; chat: false, as the "
    "template writes them).",
    "allowed_token_ids": "Only these tokens.",
    "bad_words": "Strings that the answer never holds.",
    "background": "Write the response with nobody waiting: it is fetched, followed or cancelled by "
    "its id.",
    "best_of": "So many answers, of which the likeliest `n` are shown; with a beam search its "
    "width. Not with `stream`, unless it is `n`.",
    "cache_salt": "Only requests with the same salt share cached prefixes.",
    "budget_tokens": "The longest thought, in tokens; less than `max_tokens`.",
    "content": "Text, or parts of it; /v1/messages: text, or blocks.",
    "disable_parallel_tool_use": "At most one call.",
    "display": "`omitted`: thoughts are not shown.",
    "format": "JSON of a schema.",
    "input_schema": "The JSON Schema of the input.",
    "is_error": "The template sees `Error: ` before the result.",
    "output_config": "Effort and format.",
    "output_format": "As `output_config.format`.",
    "stop_sequences": "Strings that end the answer, but not its thoughts; `stop_sequence` says "
    "which did.",
    "system": "What stands before all messages.",
    "thinking": "Of a request: whether the model thinks (left out: it does not). Of a block: what "
    "it thought.",
    "tool_use_id": "The call that this is the result of.",
    "user_id": "As `user`.",
    "arguments": "A JSON object, as a string.",
    "call_id": "The call, in the words of who made it.",
    "chat_template": "A Jinja template in place of the checkpoint's, with "
    "--trust-request-chat-template; otherwise refused.",
    "chat_template_kwargs": "Variables for the chat template.",
    "continue_final_message": "Go on with the last message instead of answering it.",
    "continuous_usage_stats": "`usage` in every chunk.",
    "dimensions": "The first so many numbers of each vector, where the model was trained for it "
    "(`matryoshka_dimensions`, `is_matryoshka` in its config); otherwise refused.",
    "early_stopping": "When a beam search ends: with `best_of` whole answers, or when nothing "
    'better is to be expected, or ("never") can come.',
    "echo": "Repeat the prompt before its continuation.",
    "encrypted_content": "Thoughts as they came with `include`: opaque, but no secret.",
    "effort": "As `reasoning_effort`.",
    "encoding_format": "Vectors as numbers, or as float32 in base64.",
    "frequency_penalty": "Lower tokens by how often the answer holds them.",
    "choice": "One of these strings.",
    "deadline_ms": "Milliseconds from the request's arrival to the end of its answer, or it fails "
    "(503 or 400 at the door, 504 later).",
    "disable_additional_properties": "No properties but those that the schema names.",
    "disable_any_whitespace": "JSON without whitespace.",
    "disable_fallback": "There is one backend, and nothing to fall back to.",
    "generate_summary": "As `summary`.",
    "grammar": "A grammar in Lark's form, or GBNF.",
    "guided_choice": "As `structured_outputs.choice`.",
    "guided_decoding_backend": "There is one.",
    "guided_grammar": "As `structured_outputs.grammar`.",
    "guided_json": "As `structured_outputs.json`.",
    "guided_regex": "As `structured_outputs.regex`.",
    "guided_whitespace_pattern": "As `structured_outputs.whitespace_pattern`.",
    "ignore_eos": "Go on past the end-of-sequence token.",
    "include": "Log-probabilities of the text, or thoughts as `encrypted_content`; the rest is of "
    "items that no answer here has.",
    "include_progress": "SSE comments before the first token: place in the queue, share of the "
    "prompt computed.",
    "include_reasoning": "Show thoughts (default: true).",
    "include_stop_str_in_output": "Keep the stop string in the text.",
    "include_timing": "`timing` in each choice's last chunk, or in each choice of an answer that "
    "is not streamed.",
    "include_usage": "A last chunk with the whole `usage`.",
    "input": "Responses: what the user says, or items: messages, calls, their results, thoughts. "
    "Embeddings: text, token ids, or arrays of either, up to the model's context each. "
    "/v1/messages: a call's arguments.",
    "instructions": "What the system says, before everything else. Not kept for the next response.",
    "json": "JSON of this schema.",
    "json_object": "A JSON object.",
    "length_penalty": "Beam search: answers are compared by log-probability over their length to "
    "this power.",
    "logit_bias": "Token ids, and what is added to their logits.",
    "logprobs": "Chat: whether to report log-probabilities; completions: of how many alternatives.",
    "max_completion_tokens": "The longest answer, at most the rest of the context (default: all of "
    "that). More than the whole context is refused.",
    "max_output_tokens": "The longest answer, with thoughts, at most the rest of the context "
    "(default: all of that). More than the whole context is refused.",
    "max_tool_calls": "Of tools that the server itself has: there are none.",
    "max_queue_ms": "The longest wait for a seat, or the request fails (503).",
    "max_tokens": "The longest answer, at most the rest of the context (default: chat, all of "
    "that; completions, 16). More than the whole context is refused, but by /v1/messages. "
    "Completions: 0 for the prompt alone.",
    "messages": "The chat so far.",
    "min_p": "Drop tokens less likely than this share of the likeliest.",
    "min_tokens": "No end before this many tokens.",
    "model": "One of /v1/models (default: the only one).",
    "n": "How many answers to each prompt.",
    "output": "What the call returned.",
    "parallel_tool_calls": "Whether the answer may hold several calls (default: true).",
    "parameters": "The JSON Schema of the arguments.",
    "presence_penalty": "Lower tokens that the answer holds.",
    "previous_response_id": "The response that this one goes on with.",
    "normalize": "Scale each vector to length 1 (default: true).",
    "priority": "With --scheduling-policy priority, or fair (among a tenant's own): smaller "
    "is sooner.",
    "prompt": "Text, token ids, or several of either.",
    "prompt_logprobs": "Of how many alternatives to report log-probabilities for each token of "
    "the prompt. Not with `stream`.",
    "reasoning": "As `reasoning_content`.",
    "reasoning_content": "What an assistant thought, as it was answered.",
    "reasoning_effort": "For templates that know it; `none` is no thinking. Where a template only "
    "has a switch for that, anything else is thinking.",
    "regex": "Text that matches as a whole.",
    "repetition_penalty": "Divide the logits of tokens that prompt or answer hold.",
    "response_format": "Text, a JSON object, or JSON of a schema; `json_object` with a `schema`, "
    "and TGI's `json` and `regex` with their `value`, too.",
    "return_token_ids": "Also the token ids of prompt and answer.",
    "return_token_strs": "Also the tokens as the vocabulary writes them.",
    "return_tokens_as_token_ids": "In log-probabilities, tokens as `token_id:…`.",
    "seed": "The same seed and request give the same answer, in whatever batch (-1: none).",
    "skip_special_tokens": "Leave special tokens out of the text.",
    "spaces_between_special_tokens": "Spaces between special tokens that are shown.",
    "stop": "Strings that end the answer, but not its thoughts.",
    "stop_token_ids": "Tokens that end the answer.",
    "store": "Keep the response for who asks for it by id, and goes on with it (default: true).",
    "stream": "Send the answer as server-sent events, token by token.",
    "stream_options": "What a stream reports besides its text.",
    "strict": "Calls that the model chooses to make follow the schema too; forced ones always do.",
    "structural_tag": "Text, free up to a trigger: `structures` and `triggers`, or a `format`.",
    "structured_outputs": "What the answer must look like: one constraint.",
    "summary": "Show the thoughts as a summary. It is the thoughts themselves.",
    "temperature": "0 is greedy.",
    "thinking_token_budget": "The longest thought, in tokens (-1: no limit).",
    "tokens": "The token ids.",
    "tool_call_id": "Role tool: the call that this is the result of.",
    "tool_calls": "Role assistant: the calls that it made.",
    "tool_choice": "Whether the answer may call tools, must, or must call one by name.",
    "tools": "Functions that the model may call.",
    "top_k": "Draw from the likeliest k (0 or -1: all).",
    "top_logprobs": "How many alternatives to report for each token.",
    "top_p": "Draw from the likeliest that make up this probability.",
    "truncate_prompt_tokens": "Keep so many tokens of the prompt (-1: what leaves room for the "
    "answer).",
    "truncation": "What happens to a chat that does not fit: it is refused, or (auto) its oldest "
    "turns are left out.",
    "truncation_side": "Which side is cut off (default: left).",
    "user": "Without API keys: whose share of the machine this is, with --scheduling-policy fair.",
    "ttft_ms": "As `deadline_ms`, to the first token.",
    "use_beam_search": "Search for the likeliest answer instead of drawing one. Not with `stream`.",
    "whitespace_pattern": "What may stand between JSON's tokens.",
}
