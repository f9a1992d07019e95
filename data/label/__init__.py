"""Comparisons from people: sample several responses to a prompt, ask which is better, append the answer to a JSONL.

    python -m data.label --init out/sft --prompts PROMPTS.jsonl --out mine.jsonl       a page in the browser, for people
    python -m data.label … --init out/sft,out/ppo        two models answer; nothing on the page says which is which
    python -m data.label … --samples 4                   a ranking of four in place of a choice between two
    python -m data.label … --terminal                    the same in the terminal
    python -m data.label … --judge FILE.py:function      a simulated person decides every pair
    python -m data.label --out mine.jsonl --report       what is in a file: counts, position bias, agreement

A row is {"prompt", "chosen", "rejected"}, or {"prompt", "ranked"} (best first) where there are more than two, with the
time, annotator, checkpoint, seed, seconds taken and the place where the preferred one was shown. A tie or a skip is a
row with "verdict", which readers leave out. Every answer is on disk before the next question is shown, so nothing is
lost; starting again continues. What a prompt gets for responses depends on seed and prompt alone.

The page is served on this machine alone unless --host says otherwise, under an address with a random token.
"""

from data.label.command import Config, label, serve
from data.label.report import report
from data.label.sampling import Answer, preference, sample_responses, simulate
from data.label.server import Handler, Server
from data.label.sitting import Question, Sitting, alone, read_answers
from data.label.terminal import ask_in_terminal, visible
