# make setup   build .venv; takes seconds when nothing has changed; REPAIR="spconv mmcv" installs these stages again
# make lint    check style and formatting
# make test    run the tests, in up to four processes; PYTEST_ARGS="-k config" selects some
# make demo    quantise, score and draw on a small synthetic world; DEMO_ARGS="--limit 20"
# make bench   time calibration and fake quantisation against pytorch-quantization; BENCH_ARGS="--only model"
.PHONY: setup lint test demo bench

BIN := .venv/bin

setup:
	@PYTHON="$(PYTHON)" WHEELS="$(WHEELS)" REPAIR="$(REPAIR)" bash requirements/install.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

demo: setup
	@$(BIN)/python qat/demo.py $(DEMO_ARGS)

bench: setup
	$(BIN)/python -W ignore bench/bench.py $(BENCH_ARGS)
