import torch

from medlora.kernels.copies import SHARE, Copies


def test_each_goes_to_its_place_and_nowhere_else(device, dtype) -> None:
    shapes = [(3, 5), (SHARE // 64 + 1, 64), (1, 1)]
    sources = [torch.randn(shape, device=device) for shape in shapes]
    wide = [torch.full((rows, columns + 3), 7.0, dtype=dtype, device=device) for rows, columns in shapes]
    targets = [each[:, : shape[1]] for each, shape in zip(wide, shapes, strict=True)]
    copies = Copies(sources, targets)
    for _ in range(2):
        copies()
        for source, each in zip(sources, wide, strict=True):
            assert torch.equal(each[:, :-3], source.to(dtype)) and bool((each[:, -3:] == 7).all())
        for place, source in enumerate(sources):  # the optimizer's weights may move
            copies.sources[place] = torch.randn_like(source)
        sources = copies.sources


def test_what_the_kernel_cannot_read_goes_one_by_one(device) -> None:
    sources = [torch.randn(3, 5, device=device).bfloat16(), torch.randn(5, 3, device=device).t()]
    targets = [torch.empty(3, 5, device=device) for _ in sources]
    copies = Copies(sources, targets)
    copies()
    assert copies.tables[-1] is None
    assert all(torch.equal(target, source.float()) for source, target in zip(sources, targets, strict=True))
