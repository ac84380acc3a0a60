"""Does the engine with our scheduler compute what vLLM's own does, and as fast? `python -m tests.benchmarks.engine_check`

Engines of the same model stand side by side: two stock ones (`--scheduling-policy priority`) and one with our scheduler,
its link on and somebody listening. All are sent the same requests, with the same tags, at once and in more memory than
they have, so that each scheduler puts together steps of its own and preempts whom it will. Then

* every token is compared. Greedy decoding in float32 gives the same tokens in whatever steps they are computed, but for
  two tokens that are equally likely to within rounding. So the two best of each token are asked for: rounding is
  measured, and where answers part, the gap says whether that was a tie. Stock against stock is one control. The other
  has to differ: the same requests, but for the first token of each prompt.
* output tokens a second are measured in alternating rounds, as ratios within a round; stock against stock is the noise.

One JSON line is appended to the file for each run. `--gpu` is the same on an NVIDIA GPU, the speed measured on a model
of the size of a 7B Llama with weights made up by the engine, after the tests that need no engine and the cost of a step.
"""
