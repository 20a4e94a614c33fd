# `make demo` runs the whole job on synthetic clips; `make test` checks everything. Both set themselves up in .venv.
PYTHON ?= python3
RUN := .venv/bin/python
PYTEST := $(RUN) -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: demo test coverage lint clean

demo: .venv/installed
	$(RUN) -m vos.sample --out demo/data --overwrite
	$(RUN) featurize.py --data demo/data --split train --out demo/features/train --overwrite
	$(RUN) featurize.py --data demo/data --split val --out demo/features/val --overwrite
	$(RUN) train.py --features demo/features/train --val-features demo/features/val --decoder linear --out demo/run --overwrite
	$(RUN) evaluate.py --model demo/run --features demo/features/val --out demo/results --overwrite
	$(RUN) package.py --results demo/results --out demo/submission.zip --overwrite
	$(RUN) evaluate.py --data docs/bunny --out demo/bunny --overwrite
	@echo
	@$(RUN) -c 'import json; print("mean IoU", round(json.load(open("demo/results/scores.json"))["mean_iou"], 4))'
	@echo "look at: demo/results/report.html, $$(ls demo/results/overlays/* | head -n 1), $$(ls demo/run/predictions/*.png | tail -n 1)"
	@echo "submission: demo/submission.zip"
	@echo "a real clip, by the pretrained decoder: demo/bunny/overlays/bunny.webp"

test: .venv/installed-dev lint
	$(PYTEST)

coverage: .venv/installed-dev
	$(PYTEST) --cov

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/mypy *.py vos benchmarks

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv demo
