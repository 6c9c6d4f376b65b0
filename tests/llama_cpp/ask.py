"""Ask llama.cpp for log-probabilities of next tokens; run by the Python of an environment that has ``xllamacpp``.

Reads a JSON object from standard input (``model``, a file; ``prompts``, lists of token ids; ``vocabulary``, how many
tokens there are; ``sampled``, one that is a letter) and writes, for each prompt, the log-probabilities of all tokens by
id.
"""

import json
import sys

import xllamacpp


def main() -> None:
    asked = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.cpuparams.n_threads = 128, 1, 0, 1
    params.warmup = params.fit_params = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = 0
    server = xllamacpp.Server(params)
    answers = []
    for prompt in asked["prompts"]:
        request = {"prompt": prompt, "n_predict": 1, "logprobs": asked["vocabulary"], "cache_prompt": False}
        # a token whose bytes are no whole character would be withheld, probabilities and all; the bias is not in them
        reply = server.handle_completions({**request, "temperature": 0, "logit_bias": [[asked["sampled"], 1e6]]})
        reply = json.loads(reply) if isinstance(reply, str) else reply
        best = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        row = {entry["id"]: entry["logprob"] for entry in best}
        answers.append([row[token] for token in range(asked["vocabulary"])])
    json.dump(answers, sys.stdout)


main()
