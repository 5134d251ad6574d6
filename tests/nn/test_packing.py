import pytest
import torch

from spade_ext.nn.packing import Documents


def test_documents_are_runs_of_equal_ids_from_their_first_to_their_last_real_token():
    ids = torch.tensor([[7, 7, 7, 2, 2], [0, 0, 7, 7, 0]])
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()
    documents = Documents(ids, mask)
    assert documents.row.tolist() == [0, 0, 1, 1, 1]
    assert documents.lengths.tolist() == [3, 1, 1, 2, 1]
    x = torch.arange(1.0, 11).view(2, 5, 1)
    everything = torch.arange(5)
    gathered = documents.gather(x, everything)
    assert gathered.squeeze(-1).tolist() == [[1, 2, 3], [4, 0, 0], [7, 0, 0], [8, 9, 0], [10, 0, 0]]
    scattered = documents.scatter([(everything, gathered)])
    assert scattered.squeeze(-1).tolist() == [[1, 2, 3, 4, 0], [0, 7, 8, 9, 10]]


@pytest.mark.parametrize("equal", [False, True])
def test_groups_hold_each_document_once(equal):
    ids = torch.arange(9).repeat_interleave(torch.tensor([1, 1, 2, 3, 4, 5, 7, 8, 9]))[None]
    documents = Documents(ids, None)
    groups = documents.groups(equal=equal)
    assert torch.cat(groups).sort().values.tolist() == list(range(9))
    lengths = [documents.lengths[group].tolist() for group in groups]
    expected = [[1, 1], [2], [3], [4], [5], [7], [8], [9]] if equal else [[1, 1], [2], [3, 4], [5, 7, 8], [9]]
    assert lengths == expected
    x = torch.randn(1, 40, 3)
    parts = [(group, documents.gather(x, group)) for group in groups]
    assert torch.equal(documents.scatter(parts), x)


def test_padding_with_an_id_of_its_own_parts_documents_as_it_does_in_attention():
    documents = Documents(torch.tensor([[1, 1, 0, 1], [0, 0, 2, 2]]), torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1]]).bool())
    assert documents.lengths.tolist() == [2, 1, 2] and documents.row.tolist() == [0, 0, 1]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 5)])
def test_padding_alone_holds_no_document(shape):
    documents = Documents(torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool))
    assert documents.lengths.tolist() == documents.row.tolist() == documents.groups(equal=False) == []


def test_gradients_flow_through():
    documents = Documents(torch.tensor([[0, 1, 1]]), None)
    x = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    everything = torch.arange(2)
    assert torch.autograd.gradcheck(
        lambda x: documents.scatter([(everything, documents.gather(x, everything) ** 2)]), x
    )
