"""Is a device right? What the tests hold the CPU to, seen on the device itself.

python -m tests.checks --device cuda                every check, in a table; exit code 1 if one fails
python -m tests.checks --device cuda decoding       one of decoding, ratio, resume
"""

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

import data
import ppo
from common import cli, nets, runs
from model import GPT, ScalarModel
from tests.contenders import make_gpt, random_tokens

SHAPES = ["gpt2", "llama-1b-cut"]
PROMPT, NEW = 40, 40
Finding = tuple[str, str, bool]  # what was asked, what was found, whether that is right


def loud_gpt(name: str, device: torch.device) -> GPT:
    """A net in which what the blocks add drowns the embedding, so that a token depends on all before it."""
    model = make_gpt(name, PROMPT + NEW, device).eval()
    model.config.eos = model.config.vocab_size - 1
    for parameter in model.h.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def prompts_of(name: str, rows: int) -> list[list[int]]:
    """Prompts of unlike lengths."""
    return [row[: PROMPT - 3 * i] for i, row in enumerate(random_tokens(name, rows, PROMPT).tolist())]


def precisions(device: torch.device, **options) -> dict[str, tuple[ppo.Config, torch.autocast]]:
    """float32 and bfloat16, as the stages set them up."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        cfg = ppo.Config(device=str(device), dtype=dtype, response_len=NEW, **options)
        found[dtype] = cfg, cli.setup(cfg)[1]
    return found


# --- the checks -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decoding(name: str, device: torch.device) -> list[Finding]:
    """Greedy tokens of the cached decode against a forward over the whole text, without a cache.

    Where rounding differs, the decode may take the second of two tokens that are almost as likely. So the finding is by
    how much the logit of a token is below the largest, in standard deviations of the logits.
    """
    model, findings = loud_gpt(name, device), []
    for dtype, (_, autocast) in precisions(device).items():
        with autocast:
            tokens, prompt_len, length = model.generate(prompts_of(name, 4), NEW, temperature=0)
            hidden = model.hidden(tokens)
        logits = F.linear(hidden.float(), model.output_weight)[:, :-1]  # (B, T − 1, V)
        short = logits.amax(-1) - logits.gather(2, tokens[:, 1:, None])[..., 0]
        place = torch.arange(1, tokens.shape[1])
        drawn = (place >= prompt_len[:, None]) & (place < length[:, None])  # (B, T − 1)
        worst = (short[drawn.to(device)].max() / logits.std()).item()
        asked = f"greedy decode with a cache ({dtype}) = without, {name}"
        findings.append((asked, f"logits at most {worst:.1e} σ apart", worst < (1e-3 if dtype == "float32" else 0.1)))
    return findings


def ratio(name: str, device: torch.device) -> list[Finding]:
    """PPO's ratio and the KL to the reference before the first step, token by token."""
    policy, findings = loud_gpt(name, device), []
    value = ScalarModel(loud_gpt(name, device)).to(device)
    for dtype, (cfg, autocast) in precisions(device, batch_size=8, minibatch_size=8, epochs=1).items():
        ref, reward = (nets.freeze(copy.deepcopy(net), autocast) for net in (policy, value))
        with autocast:
            batch = ppo.rollout(policy, prompts_of(name, 8), cfg, torch.Generator().manual_seed(0))
            batch |= ppo.read(batch, policy, ref, value, ppo.scorer(reward, None, -1, cfg), cfg)
            batch |= ppo.estimate(batch, cfg.kl_coef, cfg)
            off = torch.zeros_like(batch["logp"])
            for rows in torch.tensor([0, 3, 5, 6, 1, 2, 4, 7]).split(4):  # other rows together than `read` has
                part = ppo.select(batch, rows)
                logp = policy.logprobs(part["tokens"], part["prompt_len"], part["length"]).detach()
                off[rows.to(device), : logp.shape[1]] = (logp - part["logp"]).exp() - part["mask"].float()
        still = torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=0.0)
        first = ppo.update(policy, value, still, still, batch, 0.0, 0.0, cfg, autocast, 0)["policy/ratio"]
        off = off[batch["mask"]]
        spread, worst = off.std().item(), off.abs().max().item()
        limit = 1e-3 if dtype == "float32" else cfg.cliprange
        asked = f"PPO's ratio is 1 before the first step ({dtype}), {name}"
        found = f"spread {spread:.1e}, at most {worst:.1e} off; policy/ratio {first:.6f}"
        findings.append((asked, found, worst < limit and abs(first - 1) < limit / 10))
        apart = (batch["logp"] - batch["ref_logp"]).abs().max().item()
        asked = f"no KL to the frozen copy before the first step ({dtype}), {name}"
        findings.append((asked, f"at most {apart:.1e} nats a token", apart < limit))
    return findings


def resume(name: str, device: torch.device) -> list[Finding]:
    """A run of ppo.py that ends after half its iterations and is resumed, against one that runs through.

    Where kernels add up in any order, two whole runs differ too; then the resumed run may differ by ten times as much.
    """
    encoding = data.learn_bpe(["ask me. yes yes no. tell me a tale of a fox. yes! no?"] * 9, 300)
    model = loud_gpt(f"{encoding.n_vocab}x2x2x32", device)
    model.config.eos = encoding.eot_token
    with tempfile.TemporaryDirectory() as folder:
        for kind, net in (("sft", model), ("reward", ScalarModel(copy.deepcopy(model)))):
            Path(folder, kind).mkdir()
            nets.save_model(net, encoding, Path(folder, kind, "model.pt"))
        words = ["yes", "no", "fox", "tale", "me"]
        rows = [{"prompt": f"ask {a} {b} {c}."} for a in words for b in words for c in words]
        data.write_jsonl(Path(folder, "prompts.jsonl"), rows)

        def train(out: str, ends_early: bool = False) -> torch.Tensor:
            """All weights at the end of a run in `out`."""
            save = runs.Run.save

            def save_and_stop(run: runs.Run, *args, **parts) -> None:
                save(run, *args, **parts)
                raise KeyboardInterrupt

            cfg = ppo.Config(
                data=f"{folder}/prompts.jsonl", init=f"{folder}/sft", reward=f"{folder}/reward", out=f"{folder}/{out}",
                device=str(device), iterations=4, save_every=2, batch_size=8, minibatch_size=4, response_len=8,
                eval_prompts=4, value_warmup=1,
            )  # fmt: skip
            if ends_early:
                with mock.patch.object(runs.Run, "save", save_and_stop):
                    try:
                        ppo.train(cfg)
                    except KeyboardInterrupt:
                        cfg.resume = True
            ppo.train(cfg)
            ended, _ = nets.load_gpt(cfg.out, torch.device("cpu"))
            return torch.cat([p.detach().flatten() for p in ended.parameters()])

        quiet = mock.patch.object(runs, "write_page"), mock.patch("builtins.print")  # no page, no words
        with quiet[0], quiet[1]:
            whole, again, resumed = train("whole"), train("again"), train("resumed", ends_early=True)
    apart, noise = ((x - whole).norm().item() / whole.norm().item() for x in (resumed, again))
    found = "bit for bit" if apart == 0 else f"{apart:.1e} of the weights apart; two whole runs {noise:.1e}"
    return [("a resumed run of PPO = the run that was not stopped", found, apart <= 10 * noise)]


CHECKS = {"decoding": decoding, "ratio": ratio, "resume": resume}


def run(check: str, names: list[str], device: torch.device) -> list[Finding]:
    """What a check finds for each shape. An error is a finding too."""
    findings = []
    for name in names if check != "resume" else names[:1]:
        try:
            findings += CHECKS[check](name, device)
        except Exception as error:  # a fault of the device can be any
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            findings.append((f"{check}, {name}", why, False))
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("check", nargs="*", default=list(CHECKS), help=f"of {', '.join(CHECKS)}; default all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    options = parser.parse_args()
    device, failed = cli.pick_device(options.device), False
    for check in options.check:
        for asked, found, right in run(check, options.shapes.split(","), device):
            print(json.dumps({"check": check, "asked": asked, "found": found, "right": right}), flush=True)
            failed = failed or not right
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
