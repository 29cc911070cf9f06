"""Post-training INT8 quantisation of BEVFusion: `lean.quantize`, `lean.funcs` and `lean.train`."""
