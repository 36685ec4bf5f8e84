"""The command ``sae``: one module per verb, loaded only when its verb is typed."""

import importlib
import os
import signal
import sys
import threading

VERBS = {
    "demo": "the whole road on the bundled model: train, evaluate, index, label, steer",
    "capture": "write the activations of a model on text to disk, once for many trainings",
    "store": "look for damage in stored activations, and repair it",
    "train": "train a sparse autoencoder on a model's activations",
    "sweep": "train many sparse autoencoders on one stream of activations, and compare them",
    "evaluate": "measure an SAE on text it has not seen",
    "index": "find out what makes each feature fire, and give it a first label",
    "label": "name features: by patterns, by a language model, from a file; and score the names",
    "search": "find features by words, by a text, or by what tells two sets of texts apart",
    "export": "labels and feature pages as CSV, JSON, HTML, or for Neuronpedia and delphi",
    "steer": "write text with a feature turned up or down",
    "explore": "browse, label and steer features in the web browser",
    "convert": "an SAE from elsewhere into our format, or ours into another's",
    "push": "upload an SAE to the Hugging Face hub",
    "info": "what a run, a sweep, a store or an SAE holds, or where a model can be read",
}
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
TERMINATED = 143  # 128 + SIGTERM


def _usage() -> str:
    verbs = "\n".join(f"  {name:<10}{what}" for name, what in VERBS.items())
    return (
        "usage: sae VERB [...]\n\nTrain sparse autoencoders on the activations of open transformers; label, browse and"
        f" steer their features.\n\n{verbs}\n\nsae VERB --help tells what a verb takes. Start with: sae demo"
    )


def main() -> None:
    """Run the verb that was typed.

    Exit status: 0; 2 after one sentence about bad input; 130 when interrupted, 143 when terminated.
    """
    # Threads that wait for each other should sleep: on a machine shared with others, spinning halves the speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    verb = arguments[0]
    if verb == "--version":
        from importlib.metadata import version

        print(f"saescope {version('saescope')}")
        return
    from activations.errors import InputError, Terminated

    def terminate(*about: object) -> None:
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)
    try:
        if verb not in VERBS:
            raise InputError(f"sae has no verb {verb!r}: it knows {', '.join(VERBS)}.")
        importlib.import_module(f"app.cli.{verb}").main(arguments[1:])
    except InputError as error:
        print(f"sae: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        from activations.files import is_disk_full

        if is_disk_full(error):
            sentence = "The disk is full: free some space and run the same command again."
        elif error.filename is not None and error.strerror is not None:
            sentence = f"{error.filename} cannot be used: {error.strerror}."
        else:
            raise
        print(f"sae: {sentence}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        what = "Terminated" if terminated else "Interrupted"
        print(f"\n{what}. The same command continues where this one stopped.", file=sys.stderr)
        sys.exit(TERMINATED if terminated else INTERRUPTED)
