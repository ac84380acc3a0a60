"""Agents whose prompts are text, and the text decides what they cost, as in life. Predictors are judged by them.

The words are data: `train.toml`, `held_out.toml` and `common.toml`, loaded by `sides`, and `english.toml`, loaded by `english`.
`laws` has what they imply. `program` is one agent's program, which writes the one and does the other; `classes` has the nine
classes, `material` what they are about; `tokens` counts.

**Two sides.** What is learned from and what is held out have different topics, documents, names, tools and wordings, and
obey the same laws. Half of the time (`COMMON_SHARE`) an agent takes a wording that both sides have, where there are such, as
people who write prompts have read some. Nothing else is on both.

**What the text implies**: a median of the class (`agent_types.PAPER_TYPES`) times factors, all drawn independently.

| | expressed by | moves |
|---|---|---|
| depth | 'a one-line verdict' … 'every step justified', in four levels; of code: what to look for | outputs, ×0.64 to ×1.65 |
| manner | the system prompt: 'shown on a phone' … 'go into an audit file', in three levels | outputs, ×0.9 to ×1.2 |
| difficulty | words in most, and the material: a degree, parts, hops, sentences | outputs, ×0.8 to ×1.45 |
| material | its length | prompts; outputs where it is read closely |
| width | the first prompt: a list, 'claim 1 of 9', 'a dozen chapters', 'quite a lot', or nothing | number of tasks |

'Quite a lot' is so for the class. Only the first prompt has the list; all have the other hints.

| class | tasks | their number | what else decides its cost |
|---|---|---|---|
| equation-verification | checks | lines of a solution | depth, manner, degree of the equation |
| fact-verification | checks | claims | depth, manner, parts of a claim, length of the evidence |
| kbqa-verification | checks | claims | depth, manner, hops; worded as fact-verification is |
| alfworld | turns, one by one | which errand | depth of thought, manner; prompts hold the story so far |
| code-checking | reviews | functions | what to look for, manner, length of the code |
| self-consistency | samples | solvers | depth, manner, how hard the sum is |
| plan-and-execute | a plan, steps, an answer | steps | depth, manner |
| document-merging | mergers, a vote | drafts | depth, manner, length of the drafts |
| map-reduce-summary | maps, a reduce | **three** for a chapter | depth, manner, length; begins as document-merging does |

**What it does not express** is noise (`laws`): outputs vary log-normally with σ = 0.25 between tasks and 0.12 between agents,
the number of tasks with 0.15 around what is implied, and with 0.5 where the text is silent (12 % of agents). Think times are
those of `agent_types`. Topics, names, house rules, the order of paragraphs and background documents mean nothing.

**What clients send**: `max_tokens` is one round number for all agents of a class, or none, and reveals no length; a third of
the agents send how many tasks to expect, within a fifth. Prompts of a gathering task, and of later turns, hold text as
long as what the earlier ones wrote. No prefixes are given: these are replayed without prefix caching.

How hard it is, with 100 agents a class of the one side to learn from and 100 of the other to predict from their first
prompts, as the median relative error of the total cost over three seeds that the laws were not tuned on: the class's mean 42
to 45 % (63 to 65 % on average), boosted trees on hashed words and lexical numbers 35 to 41 %, ridge regression on TF-IDF 31 to
33 %, trees on that model's output and lexical numbers 30 to 33 %, and 17 to 18 % with exactly what the text implies.
With other agents of the same side to predict, the three models are at 28, 32 and 29 %.
"""

from gateway.replay.texts.classes import write_tasks
from gateway.replay.texts.sides import HELD_OUT, TRAIN

__all__ = ["HELD_OUT", "TRAIN", "write_tasks"]
