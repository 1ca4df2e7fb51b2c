"""What llama.cpp itself makes of a GGUF file; a process of its own, as it is not ours to keep alive.

Reads JSON on standard input: `texts` to tokenise, `prompts` with special tokens, `ids` to continue by `n`.
"""

import json
import sys
import urllib.request
from typing import Any


def main(path: str) -> None:
    """Answer on standard output, in the same form."""
    import xllamacpp

    given = json.load(sys.stdin)
    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel, asked.port = path, 512, 1, 0
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
    asked.verbosity, asked.warmup, asked.fit_params = 0, False, False
    server = xllamacpp.Server(asked)

    def post(where: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        place = server.listening_address + where
        request = urllib.request.Request(place, json.dumps(body).encode(), headers)
        return json.load(urllib.request.urlopen(request))

    def tokens(text: str, special: bool) -> Any:
        return post("/tokenize", content=text, add_special=True, parse_special=special)["tokens"]

    said = [
        post("/completion", prompt=ids, n_predict=given["n"], temperature=0, return_tokens=True)
        for ids in given["ids"]
    ]
    answer = {
        "texts": [tokens(text, False) for text in given["texts"]],
        "prompts": [tokens(text, True) for text in given["prompts"]],
        "ids": [one["tokens"] for one in said],
    }
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
