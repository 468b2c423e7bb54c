"""`python docs/generate.py`: docs/api.md, from the signatures and docstrings of the sources, which are not imported."""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 100
# What stands in a docstring before an indented list or paragraph.
SECTIONS = ("Args", "Attributes", "Returns", "Raises")

# Modules whose `__all__` is their reference, and names of modules that have none.
MODULES: dict[str, tuple[str, ...]] = {
    "mmkernels": (),
    "mmkernels.masks": (
        *("Intervals", "Dense", "intervals", "causal", "key_padding", "lengths", "documents", "prefix_causal"),
        *("media", "tiles", "qformer_itc", "qformer_itm", "qformer_itg", "qformer_pairs", "dense", "from_dense"),
    ),
    "mmcore.losses": (),
    "mmcore.nn": (),
    "mmcore.ema": (),
    "mmcore.optim": (),
    "mmcore.integrations.contrastive": ("use_global_loss",),
    "mmcore.integrations.transformers": ("register", "accelerate", "restore", "Accelerated"),
    "mmcore.data": (),
    "mmcore.data.opening": ("ChatData", "open_chats", "open_held_out"),
    "mmcore.data.text.templates": ("ChatTokens",),
    "mmcore.systems.clip.model": ("CLIP", "CLIPConfig", "TextConfig"),
    "mmcore.systems.clip.shapes": ("clip_config",),
    "mmcore.systems.clip.weights": ("load_clip", "save_clip"),
    "mmcore.systems.siglip.model": ("SigLIP", "SigLIPConfig"),
    "mmcore.systems.siglip.shapes": ("siglip_config",),
    "mmcore.systems.siglip2.model": ("SigLIP2", "Siglip2Config", "NaflexTower"),
    "mmcore.systems.siglip2.weights": ("load_siglip2", "save_siglip2"),
    "mmcore.data.transforms.naflex": ("Patches", "NaflexPreprocess", "patch_grid"),
    "mmcore.parts.vit": ("ViT", "VisionConfig"),
    "mmcore.parts.text": ("TextTower", "TextConfig"),
    "mmcore.parts.padded": ("PaddedTokenizer", "load_padded_tokenizer"),
    "mmcore.weights.folder": ("ModelFolder",),
    "mmcore.data.transforms.masks": ("random_mask", "block_mask", "coarse_mask", "gather", "restore", "hidden"),
    "mmcore.systems.mae.model": ("MAE", "MAEConfig"),
    "mmcore.systems.blip2.qformer": ("QFormer", "QFormerConfig"),
    "mmcore.systems.blip2.model": ("BLIP2", "BLIP2Config"),
    "mmcore.systems.blip2.weights": ("load_blip2", "save_blip2", "load_blip2_lm", "save_blip2_lm"),
    "mmcore.systems.blip2.lm": ("BLIP2LM",),
    "mmcore.parts.adapters": ("Lora",),
    "mmcore.systems.llava.model": ("Llava", "LlavaConfig"),
    "mmcore.systems.llava.weights": ("load_llava", "save_llava", "load_projector"),
    "mmcore.metrics": (),
    "mmcore.recipe": (
        *("Recipe", "OnPairs", "OnLanguageModel", "Contrastive"),
        *("Assets", "VisionAssets", "Step", "Embeds", "Represents", "Classifies", "Proof", "Claim"),
    ),
    "mmcore.two_towers": ("TwoTowers", "PairAssets"),
    "mmcore.image_recipe": ("ImageRecipe",),
    "mmcore.systems": ("Entry", "entries", "recipe_entry", "find_systems"),
    "mmcore.runs": ("Trained", "SavedRun", "read_run", "find_run", "load_weights"),
    "mmcore.tasks.reconstruction": ("Reconstructs",),
    "mmcore.tasks.ranks": ("Ranks",),
    "mmcore.tasks.subject": ("Subject", "HeldOut"),
    "mmcore.train.config": ("RunConfig", "EngineConfig"),
    "mmcore.train.optim": ("OptimConfig", "Rule", "param_groups", "depths"),
    "mmcore.train.schedules": ("constant", "linear", "cosine", "multistep", "const_cooldown", "warmed"),
    "mmcore.train.deepspeed_json": ("deepspeed_config",),
    "mmcore.train.engine": ("Engine", "init_distributed"),
    "mmcore.train.trainer": ("train",),
    "mmcore.systems.clip.recipe": ("Clip",),
    "mmcore.systems.siglip.recipe": ("Siglip",),
    "mmcore.systems.siglip2.recipe": ("Siglip2",),
    "mmcore.systems.mae.recipe": ("Mae",),
    "mmcore.systems.blip2.recipe": ("Blip2Stage1", "Blip2Stage2"),
    "mmcore.systems.llava.recipe": ("LlavaRecipe", "LlavaStage1", "LlavaStage2"),
}
HEAD = """# API

Written by `python docs/generate.py` from the docstrings; change those. Shapes: B batch, T tokens, H heads, K width of a
head, D width of a model, V vocabulary, P patches, Q queries; M and N rows and columns of a similarity matrix.
"""
# The comment behind a declaration, an attribute of its node.
COMMENT = "comment"
# Signatures are not examples, which `python` marks.
LANGUAGE = "py"

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef | ast.Assign


@dataclass(frozen=True)
class Source:
    """A module's file, parsed."""

    name: str
    tree: ast.Module

    @staticmethod
    @functools.cache
    def of(name: str) -> "Source":
        base = ROOT / "kernels" if name.split(".")[0] == "mmkernels" else ROOT
        path = base.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = file.read_text()
        tree, lines = ast.parse(text), text.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign):  # what `fields` tells of it
                setattr(node, COMMENT, lines[(node.end_lineno or 1) - 1].partition("  # ")[2])
        return Source(name, tree)

    @property
    def exported(self) -> list[str]:
        """Of `__all__`, without modules."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return [x for x in ast.literal_eval(node.value) if x != "masks"]
        raise ValueError(f"docs: {self.name} must have __all__, got none")

    def find(self, name: str) -> Definition:
        """What defines a name, here or where it is imported from; of overloads the function itself."""
        for node in reversed(self.tree.body):
            if isinstance(node, Function | ast.ClassDef) and node.name == name:
                return Defaults(self).visit(node)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return node
            if isinstance(node, ast.ImportFrom) and node.module and any(x.name == name for x in node.names):
                return Source.of(node.module).find(name)
        raise ValueError(f"docs: {self.name} must define {name}, got nothing")


class Defaults(ast.NodeTransformer):
    """Puts the values of a module's constants where they are defaults."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def value(self, node: ast.expr | None) -> ast.expr | None:
        if not isinstance(node, ast.Name) or not node.id.isupper():
            return node
        constant = self.source.find(node.id)
        return constant.value if isinstance(constant, ast.Assign) else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.args.defaults = [x for x in map(self.value, node.args.defaults) if x is not None]
        node.args.kw_defaults = [*map(self.value, node.args.kw_defaults)]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.value = self.value(node.value)
        return node


def written(node: ast.expr) -> str:
    """A value or a type as source, quoted and rounded as the house does."""
    if isinstance(node, ast.Constant) and isinstance(node.value, float):
        return re.sub(r"e-0(\d)", r"e-\1", repr(node.value))
    return re.sub(r"'([^'\"]*)'", r'"\1"', ast.unparse(node))


def named_type(node: ast.expr) -> str:
    """A type, without the quotes of one that is named before it is there."""
    is_quoted = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return str(node.value) if is_quoted else written(node)  # pyright: ignore[reportAttributeAccessIssue]


def called(head: str, parts: list[str], tail: str = "") -> str:
    """`head(parts)tail`, a line each where one is too short."""
    line = f"{head}({', '.join(parts)}){tail}"
    if len(line) <= WIDTH:
        return line
    return f"{head}(\n" + "".join(f"    {part},\n" for part in parts) + f"){tail}"


def arguments(function: Function, *, is_method: bool) -> list[str]:
    """As they stand between the parentheses."""
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    without = [None] * (len(plain) - len(given.defaults))
    parts = [_argument(x, default) for x, default in zip(plain, [*without, *given.defaults])]
    if is_method:
        parts = parts[1:]
    if given.vararg:
        parts.append(f"*{_argument(given.vararg, None)}")
    elif given.kwonlyargs:
        parts.append("*")
    parts += [_argument(x, default) for x, default in zip(given.kwonlyargs, given.kw_defaults)]
    return parts + ([f"**{_argument(given.kwarg, None)}"] if given.kwarg else [])


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    typed = argument.arg + (f": {named_type(argument.annotation)}" if argument.annotation else "")
    if default is None:
        return typed
    return f"{typed} = {written(default)}" if argument.annotation else f"{typed}={written(default)}"


def signature(function: Function, name: str, *, is_method: bool = False) -> str:
    tail = f" -> {named_type(function.returns)}" if function.returns else ""
    return called(name, arguments(function, is_method=is_method), tail)


def prose(text: str | None) -> str:
    """A docstring as Markdown: its sections are lists, a line an entry."""
    lines, found, is_code = (text or "").splitlines(), [], False
    section, entry_indent = "", 0
    for line in lines:
        stripped, indent = line.strip(), len(line) - len(line.lstrip())
        is_code ^= stripped.startswith("```")
        if is_code or stripped.startswith("```"):
            found.append(f"```{LANGUAGE}" if is_code and stripped == "```" else line)
        elif indent == 0 and stripped.removesuffix(":") in SECTIONS and stripped.endswith(":"):
            section, entry_indent = stripped, 0
            found += ["", f"**{stripped.removesuffix(':')}**", ""]
        elif not section or not stripped:
            found.append(line)
        elif indent == 0:
            section = ""
            found.append(line)
        else:
            entry_indent = entry_indent or indent
            found.append(_entry(stripped, section, is_new=indent == entry_indent))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(found)).strip()


def _entry(line: str, section: str, *, is_new: bool) -> str:
    named = re.match(r"([\w, *]+): ", line)
    if not is_new or section == "Returns:":
        return line if section == "Returns:" else f"  {line}"
    if named is None:
        return f"- {line}"
    names = ", ".join(f"`{x}`" for x in named[1].split(", "))
    return f"- {names}: {line[named.end() :]}"


def fields(node: ast.ClassDef) -> list[tuple[str, str]]:
    """Declarations of a dataclass or a named tuple, each with the docstring after it or the comment behind it."""
    found = []
    for x, after in zip(node.body, [*node.body[1:], None]):
        if not isinstance(x, ast.AnnAssign) or ast.unparse(x.target).startswith("_"):
            continue
        value = f" = {written(x.value)}" if x.value else ""
        text = getattr(x, COMMENT, "")
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = " ".join(str(after.value.value).split())
        found.append((f"{ast.unparse(x.target)}: {named_type(x.annotation)}{value}", text))
    return found


def of_class(node: ast.ClassDef, name: str) -> Iterator[str]:
    methods = [x for x in node.body if isinstance(x, Function)]
    made = next((x for x in methods if x.name == "__init__"), None)
    declared = fields(node) if made is None else []
    documented = [f"- `{field}`: {text}" for field, text in declared if text]
    if made is not None:
        head = called(name, arguments(made, is_method=True))
    elif len(documented) < len(declared):
        head = called(name, [field for field, _ in declared])
    else:
        bases = [ast.unparse(base) for base in node.bases]
        head = called(name, bases) if bases else name
    yield f"```{LANGUAGE}\nclass {head}\n```"
    yield prose(ast.get_docstring(node))
    if documented:
        yield "\n".join(documented)
    for method in methods:
        text = ast.get_docstring(method)
        if method.name.startswith("_") or text is None:
            continue
        decorators = {ast.unparse(x) for x in method.decorator_list}
        if "property" in decorators:
            yield f"`{name}.{method.name}`: {prose(text)}"
            continue
        is_static = "staticmethod" in decorators
        yield f"```{LANGUAGE}\n{signature(method, f'{name}.{method.name}', is_method=not is_static)}\n```"
        yield prose(text)


def entry(source: Source, name: str) -> str:
    """A name's part of the page."""
    node, parts = source.find(name), [f"### {name}"]
    if isinstance(node, ast.ClassDef):
        parts += of_class(node, name)
    elif isinstance(node, Function):
        parts += [f"```{LANGUAGE}\n{signature(node, name)}\n```", prose(ast.get_docstring(node))]
    else:
        parts.append(f"```{LANGUAGE}\n{name} = {written(node.value)}\n```")
    return "\n\n".join(part for part in parts if part)


def api() -> str:
    """The page."""
    links = (f"[{module}](#{module.replace('.', '')})" for module in MODULES)
    parts = [HEAD, ", ".join(links) + "."]
    for module, names in MODULES.items():
        source = Source.of(module)
        parts += [f"## {module}", prose(ast.get_docstring(source.tree))]
        parts += [entry(source, name) for name in names or source.exported]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    page = ROOT / "docs" / "api.md"
    page.write_text(api())
    print(page, file=sys.stderr)
