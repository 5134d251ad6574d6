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
    parts = [(group, documents.gather(x, group)) for group in documents.groups()]
    assert [part.squeeze(-1).tolist() for _, part in parts] == [[[4], [7], [10]], [[8, 9]], [[1, 2, 3]]]
    assert documents.scatter(parts).squeeze(-1).tolist() == [[1, 2, 3, 4, 0], [0, 7, 8, 9, 10]]


def test_groups_are_of_equal_lengths_and_hold_each_document_once():
    documents = Documents(torch.arange(7).repeat_interleave(torch.tensor([5, 1, 2, 5, 1, 2, 3]))[None], None)
    groups = documents.groups()
    assert [group.tolist() for group in groups] == [[1, 4], [2, 5], [6], [0, 3]]
    x = torch.randn(1, 19, 3)
    parts = [(group, documents.gather(x, group)) for group in groups]
    assert torch.equal(documents.scatter(parts), x)


def test_padding_with_an_id_of_its_own_parts_documents_as_it_does_in_attention():
    documents = Documents(torch.tensor([[1, 1, 0, 1], [0, 0, 2, 2]]), torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1]]).bool())
    assert documents.lengths.tolist() == [2, 1, 2] and documents.row.tolist() == [0, 0, 1]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 5)])
def test_padding_alone_holds_no_document(shape):
    documents = Documents(torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool))
    assert documents.lengths.tolist() == documents.row.tolist() == documents.groups() == []


def test_gradients_flow_through():
    documents = Documents(torch.tensor([[0, 1, 1]]), None)
    x = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    groups = documents.groups()
    assert torch.autograd.gradcheck(
        lambda x: documents.scatter([(group, documents.gather(x, group) ** 2) for group in groups]), x
    )
