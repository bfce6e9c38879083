from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from canopy.errors import ContractError, RecipeError
from canopy.settings import first_problem, nearest, read_settings


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Train(Table):
    epochs: int = Field(gt=0)
    seed: int = 0


class Image(Table):
    kind: Literal["image"]
    path: str


class Cloud(Table):
    kind: Literal["cloud"]
    points: str
    options: Train | None = None


class Recipe(Table):
    name: str
    train: Train = Train(epochs=1)
    source: tuple[Annotated[Image | Cloud, Field(discriminator="kind")], ...] = ()
    by_site: dict[str, Train] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _named(self):
        if self.name == "nameless":
            raise ValueError("a recipe called nameless has no name")
        return self


def read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return read_settings(path, Recipe, what="a recipe")


def test_reads_what_is_right(tmp_path):
    recipe = read(tmp_path, 'name = "a"\n[train]\nepochs = 3\n[[source]]\nkind = "image"\npath = "p.tif"\n')
    assert recipe.train.epochs == 3
    assert isinstance(recipe.source[0], Image)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('nmae = "a"', "unknown key 'nmae'; did you mean 'name'?"),
        ('name = "a"\nzzz = 1', "unknown key 'zzz'; valid are by_site, name, source, train"),
        ('name = "a"\n[train]\nepoch = 3', "unknown key 'train.epoch'; did you mean 'epochs'?"),
        ("", "key 'name' is missing; add it"),
        ('name = "a"\n[train]\nepochs = 0', "train.epochs: Input should be greater than 0, not 0"),
        ('name = "nameless"', "the file: a recipe called nameless has no name"),
        ('name = "a"\n[[source]]\nkind = "image"\npaht = "p"', "unknown key 'source.0.paht'; did you mean 'path'?"),
        (
            'name = "a"\n[[source]]\nkind = "cloud"\npoints = "p"\noptions = { epochs = 1, sed = 2 }',
            "unknown key 'source.0.options.sed'; did you mean 'seed'?",
        ),
        ('name = "a"\n[[source]]\nkind = "cluod"', "source.0.kind: 'cluod' is not known; did you mean 'cloud'?"),
        ('name = "a"\n[[source]]\npath = "p"', "key 'source.0.kind' is missing; add it"),
        ('name = "a"\n[by_site.OSBS]\nepochs = 1\nsead = 1', "unknown key 'by_site.OSBS.sead'; did you mean 'seed'?"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_key_and_the_remedy(tmp_path, text, message):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    assert str(caught.value) == f"{tmp_path / 'recipe.toml'}: {message}"


def test_a_file_that_is_missing_or_no_toml(tmp_path):
    with pytest.raises(RecipeError, match=r"does not exist; give the path of a recipe \(TOML\)"):
        read_settings(tmp_path / "none.toml", Recipe, what="a recipe")
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(ContractError, match=r"broken\.toml is no TOML file \(Invalid value .*\); correct it"):
        read_settings(tmp_path / "broken.toml", Recipe, what="a recipe", error=ContractError)


def test_an_unknown_key_goes_before_a_missing_one():
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"nam": "a"})
    assert first_problem(caught.value, Recipe) == "unknown key 'nam'; did you mean 'name'?"


def test_nearest_gives_all_where_none_is_near():
    assert nearest("qqq", ["b", "a"]) == "valid are a, b"
