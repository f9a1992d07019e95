"""The likeliest tokens at each place of an answer, by the policy and by its frozen copy."""

from pathlib import Path

import torch
from tiktoken import Encoding

from common import nets
from data import token_text
from model import GPT

MOST_TOKENS, MOST = 4096, 5  # of all answers together; at each place
MOST_BYTES = 2**31  # of model.pt: larger nets would take minutes, and memory beside a training run


def add_likeliest(folder: Path, rollout: dict, config: dict) -> None:
    """Give the first answers "likeliest": by π and by π₀, what `likeliest` returns. All answers lose their "ids".

    The nets are read from their files, one at a time. So π is the policy as it was saved, after the iteration's update.
    Large nets, and those with adapters, are not read.
    """
    try:
        rows = [(answer, answer.pop("ids"), len(answer["tokens"])) for answer in rollout["answers"]]
        options = config.get("options", {"lora": 1})
        large = options["lora"] or (folder / "model.pt").stat().st_size > MOST_BYTES  # a base beside adapters may be
        for name in () if large else (folder, options["ref"] or options["init"]):
            net, encoding = nets.load_gpt(name)
            left = MOST_TOKENS
            for answer, ids, n in rows:
                left -= n
                if left >= 0:
                    found = likeliest(net, encoding, ids, n, options["temperature"])
                    answer.setdefault("likeliest", []).append(found)
    except Exception as error:  # a folder that has moved, or a damaged file, raises many kinds
        print(f"{folder}: the page does not say which tokens are likeliest ({type(error).__name__}: {error})")


@torch.no_grad()
def likeliest(net: GPT, encoding: Encoding, ids: list[int], n: int, temperature: float) -> list[list[tuple]]:
    """Return the likeliest tokens, with their probabilities, at each of the last n places of `ids`.

    The logits are (N, V), of 128 places at most.
    """
    hidden, found = net.hidden(torch.tensor([ids[:-1]]))[0, -n:], []  # (n, C)
    for part in hidden.split(128):
        probs = (part @ net.output_weight.T / temperature).softmax(-1)[:, : encoding.n_vocab]  # (N, V)
        for row in zip(*(x.tolist() for x in probs.topk(MOST))):
            found.append([(token_text(token, encoding), float(f"{p:.2g}")) for p, token in zip(*row)])
    return found
