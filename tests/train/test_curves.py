from matplotlib import pyplot

from spade_ext.train.curves import plot_curves


def test_every_baseline_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    history = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.0, "eval_accuracy": 0.1}]
    plot_curves(history, {name: 0.1 for name in "abcd"}, tmp_path / "curves.png")
    labels = [text.get_text() for text in pyplot.gcf().axes[1].get_legend().get_texts()]
    monkeypatch.undo()
    pyplot.close()
    assert labels == ["validation", *"abcd"]
