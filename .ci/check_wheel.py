"""Check that a wheel holds exactly our four packages, with the bundled model, and nothing else."""

import sys
import zipfile

PACKAGES = {"activations", "sae", "features", "app"}
NEEDED = {
    "activations/builtin/model.safetensors",
    "activations/builtin/tokenizer.json",
    "activations/builtin/README.md",
    "app/explorer/theme.toml",
    "app/explorer/logo.svg",
    "app/explorer/icon.svg",
    "app/explorer/explorer_main.py",
}

names = zipfile.ZipFile(sys.argv[1]).namelist()
top = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
if top != PACKAGES:
    sys.exit(f"The wheel holds {sorted(top)}, and should hold {sorted(PACKAGES)}.")
if missing := NEEDED - set(names):
    sys.exit(f"The wheel lacks {sorted(missing)}.")
if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
    sys.exit("The wheel lacks the licence.")
print(f"The wheel holds {len(names)} files in {', '.join(sorted(top))}.")
