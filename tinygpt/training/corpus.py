"""The corpus of a run, as its training had it."""

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
    """Raises ConfigError where it is another now; the line ends with what to do ``instead``."""
    cache = shards.cache_root(cache_dir or config.cache_dir)
    corpus = corpora.open_corpus(config.data)
    wanted = config.tokenizer
    if wanted.kind in shards.READ:  # from files that may be gone: the run has a copy
        wanted = SavedTokenizer(path=str(run.tokenizer))
    prepared = shards.prepare(corpus, config.data, wanted, cache, progress)
    index = prepared.index
    now = {"tokenizer_fingerprint": index["tokenizer_fingerprint"]}
    then = {"tokenizer_fingerprint": tokenizer.fingerprint()}
    if run.results.exists():
        results = fileio.read_json(run.results, data_fingerprint=str, validation_fingerprint=str)
        for name, split in (("data_fingerprint", "train"), ("validation_fingerprint", "val")):
            now[name] = index["splits"][split]["fingerprint"]
            then[name] = results[name]
    if now != then:
        differing = [name.removesuffix("_fingerprint") for name in then if now[name] != then[name]]
        raise ConfigError(
            f"data.path={getattr(config.data, 'path', config.data.name)}: not what {run.path} was "
            f"trained on, another {', '.join(differing)} by its fingerprint{instead}"
        )
    return prepared
