"""The comparison of a cache hit with what it saves runs on what the service is now; no figure is looked at."""

from deploy.bench.tiers import compare_hit_with_preprocessing


async def test_a_hit_is_one_and_decodes_no_pixel() -> None:
    row = await compare_hit_with_preprocessing(repeats=2)
    assert row["hit ms"] < row["preprocessing ms"]  # by a factor of a hundred
