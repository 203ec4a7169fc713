"""The tokenizer network, its quantiser, and the codebook that training keeps alive."""

import pytest
import torch
import torch.nn.functional as F

from unmask.tokenizers.quantizer import CodebookTrainer, Quantizer
from unmask.tokenizers.vqgan import VQGAN, VQConfig

SMALL = VQConfig(codebook_size=32, code_dim=4, channels=8, multipliers=(1, 1, 2), encoder_blocks=(0, 1, 1),
                 decoder_blocks=(1, 0, 1), z_channels=8, norm_groups=2)


@pytest.fixture
def network() -> VQGAN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQGAN(SMALL).eval()


def test_shapes_of_any_rectangle(network: VQGAN) -> None:
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    tokens = network.encode(images)
    assert (tokens.shape, tokens.dtype) == ((2, 4, 6), torch.int64)
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < 32
    assert network.decode(tokens).shape == images.shape
    assert SMALL.downsample == 4


def test_what_does_not_fit(network: VQGAN) -> None:
    for shape in ((1, 3, 16, 18), (1, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(ValueError, match="multiples of 4"):
            network.encode(torch.zeros(shape))
    for token in (-1, 32):
        with pytest.raises(ValueError, match="a mask token cannot be decoded"):
            network.decode(torch.full((1, 2, 2), token))
    with pytest.raises(ValueError, match="one entry a level"):
        VQConfig(multipliers=(1, 2))


def test_an_image_is_decoded_alike_in_any_batch(network: VQGAN) -> None:
    tokens = torch.randint(32, (4, 2, 2), generator=torch.Generator().manual_seed(0))
    together = network.decode(tokens)
    alone = torch.cat([network.decode(t[None]) for t in tokens])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_nearest_code_is_the_one_of_largest_cosine() -> None:
    quantizer = Quantizer(50, 4)
    generator = torch.Generator().manual_seed(0)
    quantizer.embedding.weight.data = torch.randn(50, 4, generator=generator) * torch.rand(50, 1, generator=generator)
    z = torch.randn(2, 4, 3, 5, generator=generator)
    tokens = quantizer.encode(z)
    literal = F.cosine_similarity(z.permute(0, 2, 3, 1)[..., None, :], quantizer.embedding.weight, dim=-1).argmax(-1)
    assert torch.equal(tokens, literal)
    codes = quantizer.lookup(tokens)
    assert codes.shape == z.shape
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(2, 3, 5))
    assert torch.equal(quantizer.encode(codes), tokens)  # codes are their own nearest
    torch.testing.assert_close(quantizer.codebook, F.normalize(quantizer.embedding.weight, dim=-1))


def test_kmeans_finds_the_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(16, 8, generator=generator), dim=-1)
    points = centres.repeat(100, 1) + 0.05 * torch.randn(1600, 8, generator=generator)
    trainer = CodebookTrainer(Quantizer(64, 8))
    trainer.start(points, generator)
    codes = trainer.quantizer.codebook.detach()
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(64))
    assert float((centres @ codes.T).max(dim=1).values.min()) > 0.98  # every cluster has a code
    assert len(torch.unique((points @ codes.T).argmax(1))) > 48


def test_kmeans_with_fewer_latents_than_codes() -> None:
    trainer = CodebookTrainer(Quantizer(64, 8))
    trainer.start(torch.eye(8).repeat(10, 1), torch.Generator().manual_seed(0))
    codes = trainer.quantizer.codebook.detach()
    assert torch.isfinite(codes).all()
    assert len(torch.unique(codes.round(decimals=4), dim=0)) > 32


def latents(generator: torch.Generator) -> torch.Tensor:
    return F.normalize(torch.randn(8, 4, 4, 4, generator=generator), dim=1)


def step(trainer: CodebookTrainer, z: torch.Tensor, generator: torch.Generator) -> int:
    tokens = trainer.quantizer.encode(z)
    return trainer.update(z, trainer.quantizer.lookup(tokens), tokens, generator)


def test_dead_codes_come_back() -> None:
    """All codes but one begin where no latent is: within some steps nearly all are used."""
    generator = torch.Generator().manual_seed(0)
    quantizer = Quantizer(32, 4)
    quantizer.embedding.weight.data = torch.full((32, 4), 0.5) + 1e-3 * torch.randn(32, 4, generator=generator)
    trainer = CodebookTrainer(quantizer)
    restarted = [step(trainer, latents(generator), generator) for _ in range(300)]
    assert sum(restarted) > 0
    used = torch.bincount(quantizer.encode(latents(generator)).flatten(), minlength=32) > 0
    assert float(used.float().mean()) > 0.9
    torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(32))


def test_the_codebook_follows_its_latents() -> None:
    """With one code, the moving average tends to the mean direction."""
    trainer = CodebookTrainer(Quantizer(1, 2))
    generator = torch.Generator().manual_seed(0)
    z = F.normalize(torch.tensor([1.0, 2.0]), dim=0).view(1, 2, 1, 1).expand(4, 2, 3, 3)
    for _ in range(400):
        step(trainer, z, generator)
    torch.testing.assert_close(trainer.quantizer.codebook[0], z[0, :, 0, 0], atol=1e-2, rtol=0)


def test_the_state_of_the_codebook_resumes() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [latents(generator) for _ in range(20)]

    def run(trainer: CodebookTrainer, part: list[torch.Tensor], first: int) -> None:
        for i, z in enumerate(part):
            step(trainer, z, torch.Generator().manual_seed(first + i))

    whole, half, rest = (CodebookTrainer(Quantizer(32, 4)) for _ in range(3))
    start = torch.randn(32, 4, generator=generator)
    for trainer in (whole, half):
        trainer.quantizer.embedding.weight.data = start.clone()
    run(whole, batches, 0)
    run(half, batches[:9], 0)
    rest.quantizer.load_state_dict(half.quantizer.state_dict())
    rest.load_state_dict({k: v.clone() for k, v in half.state_dict().items()})
    run(rest, batches[9:], 9)
    assert torch.equal(rest.quantizer.embedding.weight, whole.quantizer.embedding.weight)


def test_gradients_reach_every_weight_but_the_codebook(network: VQGAN) -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    z = F.normalize(network.latents(images), dim=1)
    nearest = network.quantize.lookup(network.quantize.encode(z.detach())).detach()
    (network.decode_codes(z + (nearest - z).detach()) - images).pow(2).mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["quantize.embedding.weight"]
    assert network.decoder.last_layer is network.decoder.conv_out.weight
