"""Print the greedy continuation of a prompt of token ids.

python examples/engine/generate.py DIR 3,17,90 [--tokens 16] [--compile] [--tp 2]
"""

from __future__ import annotations

import argparse
import os


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the greedy continuation of a prompt of token ids.")
    parser.add_argument("model")
    parser.add_argument("prompt", type=lambda text: [int(token) for token in text.split(",")])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="under torch.compile instead of eagerly")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    given = parser.parse_args()
    # On CPU every rank wants cores of its own; vLLM's default would be a NUMA node each.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(given.tp))) if given.tp > 1 else "auto")
    from vllm import LLM, SamplingParams

    llm = LLM(
        given.model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        kv_cache_memory_bytes=1 << 26,
        enforce_eager=not given.compile,
        tensor_parallel_size=given.tp,
    )
    greedy = SamplingParams(temperature=0, max_tokens=given.tokens, ignore_eos=True, detokenize=False)
    (result,) = llm.generate([{"prompt_token_ids": given.prompt}], greedy, use_tqdm=False)
    print(",".join(map(str, result.outputs[0].token_ids)))


if __name__ == "__main__":
    main()
