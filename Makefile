# Each target first makes .venv, if it is not there or settings.ini is newer, and says so. Nothing but Python >= 3.10 is needed.
PYTHON ?= python3
LAB_ARGS ?=
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help install demo test lab docs readme export notebooks hooks bench clean

help:
	@echo "make demo     draw MiniCity, train MLMSNet with three losses, write runs/demo/report.html   (some minutes on 2 cores)"
	@echo "make lab      open the notebooks in JupyterLab   (options for it: LAB_ARGS=\"--no-browser --allow-root\")"
	@echo "make install  the environment in .venv, and no more"
	@echo "make test     style, notebooks in step with the library, all notebooks, all tests"
	@echo "make docs     build the docs site into _docs/"
	@echo "make export   notebooks -> library, then clean the notebooks and write README.md and the sidebar"
	@echo "make notebooks run the notebooks whose outputs are not those of their code"
	@echo "make hooks    git merges notebooks cell by cell (once per checkout)"
	@echo "make bench    all benchmarks, quick"

$(READY): settings.ini setup.py tools/environment.py
	@$(PYTHON) tools/environment.py

install: $(READY)

demo: $(READY)
	@$(BIN)/mlmsnet demo

lab: $(READY)
	@find nbs -name '*.ipynb' -not -path '*checkpoint*' -print0 | xargs -0 $(BIN)/jupyter trust >/dev/null  # stored figures may move before a cell is run
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter lab nbs/index.ipynb $(LAB_ARGS)

test: $(READY)
	@$(BIN)/ruff check mlmsnet nbs tests tools benchmarks setup.py
	@$(BIN)/python tools/check_sync.py
	@$(BIN)/python -m pytest tests --numprocesses 2 --dist worksteal

docs: $(READY)
	@$(BIN)/python tools/docs.py site

readme: $(READY)
	@$(BIN)/python tools/docs.py readme

export: $(READY)
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean
	@$(BIN)/python tools/docs.py readme
	@$(BIN)/python tools/docs.py sidebar

notebooks: $(READY)
	@$(BIN)/python tools/run_notebooks.py --stale

hooks: $(READY)
	@$(BIN)/python tools/hooks.py

bench: $(READY)
	@for b in augmentation confusion sliding networks minicity losses throughput; do echo "== $$b"; $(BIN)/python benchmarks/$$b.py --quick || exit 1; done

clean:
	rm -rf _proc _docs build *.egg-info .pytest_cache .ruff_cache
