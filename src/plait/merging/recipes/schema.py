"""What a recipe may say: mergekit's documented YAML, and a few keys of Plait's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from plait.errors import nearest
from plait.merging.recipes.references import Reference
from plait.merging.recipes.values import BadValueError, Setting, parse_setting


def fault(message: str, *at: str | int) -> PydanticCustomError:
    """An error whose place is the field's, and `at` within it."""
    return PydanticCustomError("recipe", "{message}", {"message": message, "at": at})


def _reference(value: Any) -> Reference:
    try:
        return value if isinstance(value, Reference) else Reference.parse(value)
    except ValueError as error:
        raise fault(str(error)) from None


def _settings(value: Any) -> dict[str, Setting]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise fault("parameters are lines of `name: value`.")
    found = {}
    for name, given in value.items():
        try:
            found[str(name)] = given if isinstance(given, Setting) else parse_setting(given)
        except BadValueError as error:
            raise fault(str(error), name, *error.at) from None
    return found


def _setting(value: Any) -> Setting | None:
    return None if value is None else _settings({"density": value})["density"]


Ref = Annotated[Reference, BeforeValidator(_reference)]
Settings = Annotated[dict[str, Setting], BeforeValidator(_settings)]
Dtype = Literal["float32", "float16", "bfloat16", "float64"]


class Strict(BaseModel):
    """Keys that do not exist are an error that names the nearest."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True)
    refused: ClassVar[Mapping[str, str]] = {}
    """Keys that mergekit knows and Plait does not, with what to do."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise fault(f"lines of `key: value` are wanted here, not {value!r}.")
        for key in value:
            if key in cls.refused:
                raise fault(f"{key} is not supported; {cls.refused[key]}", key)
            if key not in cls.model_fields:
                raise fault(f"unknown key {key!r}; {_hint(str(key), list(cls.model_fields))}", key)
        return value


def _hint(key: str, known: list[str]) -> str:
    guess = nearest(key, known)
    return f"did you mean {guess!r}?" if guess else f"known: {', '.join(known)}."


class Entry(Strict):
    """A whole model."""

    model: Ref
    parameters: Settings = Field(default_factory=dict)


class Piece(Entry):
    """Some layers of a model: [first, one past the last]."""

    layer_range: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Piece:
        if self.layer_range is not None and not 0 <= self.layer_range[0] < self.layer_range[1]:
            raise fault(f"layer_range {list(self.layer_range)} holds no layer.", "layer_range")
        return self


class Slice(Strict):
    """Layers of the result, from as many layers of each source."""

    refused = {"residual_weight": "leave it out.", "residual_model": "leave it out."}
    sources: list[Piece] = Field(min_length=1)
    base_model: Ref | None = None
    parameters: Settings = Field(default_factory=dict)


class Body(Strict):
    """Whole models, or slices."""

    models: list[Entry] | None = Field(default=None, min_length=1)
    slices: list[Slice] | None = Field(default=None, min_length=1)
    parameters: Settings = Field(default_factory=dict)


class Module(Body):
    """One part of a model of several (its language model, its vision tower)."""

    @model_validator(mode="after")
    def _one_form(self) -> Module:
        if (self.models is None) == (self.slices is None):
            raise fault("a module has models or slices, and not both.")
        return self


class TokenSource(Strict):
    """Where a token's row comes from."""

    kind: Literal["model", "model_token", "zero"] = "model"
    model: Ref | None = None
    token: str | None = None
    token_id: int | None = None

    @model_validator(mode="after")
    def _fits(self) -> TokenSource:
        if (self.kind == "zero") != (self.model is None):
            raise fault(f"a token's source of kind {self.kind!r} needs a model, or is zero.")
        if self.kind == "model_token" and (self.token is None) == (self.token_id is None):
            raise fault("a model_token needs a token or a token_id, and not both.")
        return self


def _token_source(value: Any) -> Any:
    keys = set(value) if isinstance(value, Mapping) else set()
    if value is None or isinstance(value, TokenSource) or "kind" in keys:
        return value
    return {"kind": "model", "model": value}


class TokenRule(Strict):
    """What one token's rows are made of, where a model lacks it (or, by force, in all)."""

    source: Annotated[TokenSource | None, BeforeValidator(_token_source)] = None
    force: bool = False


class Tokens(Strict):
    """The result's vocabulary."""

    source: str = "union"
    tokens: dict[str, TokenRule] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(default=None, ge=1)


class Recipe(Body):
    """A merge, as a file says it."""

    merge_method: str | None = None
    method: str | None = None
    modules: dict[str, Module] | None = Field(default=None, min_length=1)
    base_model: Ref | None = None
    input_model_parameters: dict[str, Settings] = Field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    tokenizer: Tokens | None = None
    chat_template: str | None = None
    name: str | None = None
    space: Literal["factors", "aligned", "delta"] | None = None
    rank: int | None = Field(default=None, ge=1)
    energy: float | None = Field(default=None, gt=0, le=1)
    density: Annotated[Setting | None, BeforeValidator(_setting)] = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Recipe:
        forms = [n for n in ("models", "slices", "modules") if getattr(self, n) is not None]
        if len(forms) != 1:
            raise fault(
                f"a recipe has models, slices or modules: one of them, not {' and '.join(forms)}."
                if forms
                else "a recipe needs models, slices or modules: what is merged."
            )
        if (self.merge_method is None) == (self.method is None):
            raise fault("a recipe needs merge_method (as mergekit) or method (Plait's own).")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise fault("tokenizer and tokenizer_source say the same; keep one.", "tokenizer")
        if self.density is not None:
            self.parameters.setdefault("density", self.density)
        return self

    @property
    def wanted_method(self) -> str:
        found = self.merge_method or self.method
        assert found is not None
        return found

    @property
    def writes_adapter(self) -> bool:
        """Whether nothing in it needs a whole model, so that adapters alone give an adapter."""
        whole = (self.dtype, self.out_dtype, self.wanted_tokens, self.chat_template)
        return self.slices is None and self.modules is None and all(v is None for v in whole)

    @property
    def wanted_tokens(self) -> Tokens | None:
        """The vocabulary that was asked for, in either form."""
        if self.tokenizer_source is not None:
            return Tokens(source=self.tokenizer_source.removeprefix("model:"))
        return self.tokenizer

    def bodies(self) -> dict[str | None, Body]:
        """{module's name: its models or slices}; None stands for the whole model."""
        if self.modules is None:
            return {None: self}
        return dict(self.modules.items())

    def references(self) -> list[Reference]:
        """Every model that is merged, the base first, each once."""
        found = [] if self.base_model is None else [self.base_model]
        for body in self.bodies().values():
            for piece in body.slices or ():
                found += [] if piece.base_model is None else [piece.base_model]
                found += [source.model for source in piece.sources]
            found += [entry.model for entry in body.models or ()]
        return list(dict.fromkeys(found))
