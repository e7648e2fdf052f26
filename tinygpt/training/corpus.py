"""Open the corpus that a run was trained on."""

from __future__ import annotations

from tinygpt import fileio
from tinygpt.config import Config, ConfigError, SavedTokenizer
from tinygpt.data import corpora, shards
from tinygpt.data.shards import Prepared, Progress
from tinygpt.data.tokenizers import Tokenizer
from tinygpt.runs import rundir


def own_corpus(
    run: rundir.RunDir,
    config: Config,
    tokenizer: Tokenizer,
    cache_dir: str | None,
    progress: Progress,
    instead: str = "",
) -> Prepared:
    """Return the prepared corpus of ``run``.

    Raises ConfigError where it has changed since; the line ends with what to do ``instead``.
    """
    cache = shards.cache_root(cache_dir or config.cache_dir)
    wanted = config.tokenizer
    if wanted.kind in shards.READ:  # its files may be gone, but the run has a copy
        wanted = SavedTokenizer(path=str(run.tokenizer))
    corpus = corpora.open_corpus(config.data)
    prepared = shards.prepare(corpus, config.data, wanted, cache, progress)
    index = prepared.index
    now = {"tokenizer": index["tokenizer_fingerprint"]}
    then = {"tokenizer": tokenizer.fingerprint()}
    if run.results.exists():
        results = fileio.read_json(run.results, data_fingerprint=str, validation_fingerprint=str)
        for name, split in (("data", "train"), ("validation", "val")):
            now[name] = index["splits"][split]["fingerprint"]
            then[name] = results[f"{name}_fingerprint"]
    if differing := [name for name in then if now[name] != then[name]]:
        raise ConfigError(
            f"data.path={getattr(config.data, 'path', config.data.name)}: not what {run.path} was "
            f"trained on, another {', '.join(differing)} by its fingerprint{instead}"
        )
    return prepared
