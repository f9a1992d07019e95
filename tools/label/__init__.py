"""Comparisons from people: sample several responses to a prompt, ask which is better, append the answer to a JSONL.

    python -m tools.label --init out/sft --prompts PROMPTS.jsonl --out mine.jsonl    show people a page in the browser
    python -m tools.label … --init out/sft,out/ppo        two models answer; the page does not name them
    python -m tools.label … --samples 4                   rank four responses instead of choosing between two
    python -m tools.label … --terminal                    ask the same questions in the terminal
    python -m tools.label … --judge FILE.py:function      a simulated person decides every pair
    python -m tools.label --out mine.jsonl --report       summarise a file: counts, position bias, agreement
    python -m tools.label --out mine.jsonl --anonymous P.jsonl                 copy it with P1, P2 … in place of names

A row is {"prompt", "chosen", "rejected"}, or {"prompt", "ranked"} (best first) for more than two responses. It also has
the time, annotator, checkpoint, seed, seconds taken and the position of the preferred response on the page. A tie, "all
are bad" or a skip is a row with "verdict", which is no preference; readers ignore it. "comment" and "sure" (1 to 3) are
what people add to a choice. A choice that was changed has the time "revised". Each answer is on disk before the next
question appears, so no answer is lost; the same command continues. A model's responses to a prompt depend only on the
seed and the prompt.

Only this machine can open the page unless --host says otherwise. Its address contains a random token, which is kept
beside the answers.
"""

from common.compare import sample_responses, simulate
from data.label import Answer, preference, read_answers
from tools.label.agreement import agreement, alpha
from tools.label.command import Config, label, serve
from tools.label.report import anonymous, report
from tools.label.server import Handler, Server
from tools.label.sitting import Question, Sitting, alone, question_of
from tools.label.terminal import ask_in_terminal, visible
