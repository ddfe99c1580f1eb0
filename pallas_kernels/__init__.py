"""Array operations of hybrid language models: arrays in, arrays out; no model, no mesh.

One op, one folder: ``api.py`` (the public function), ``reference.py`` (the mathematics, fp32, the oracle of
every other implementation), ``xla.py`` (the fast path where no GPU kernel runs).
"""

PROJECT = "jaxllm"
