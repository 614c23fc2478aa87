"""What tests of reports share."""

import pytest
import torch

from iirsnn.train.pipeline import Pipeline, open_data
from iirsnn.train.run_folder import RunFolder


@pytest.fixture
def pipeline(finished):
    threads = torch.get_num_threads()
    folder = RunFolder.read(finished)
    yield Pipeline(folder, open_data(folder.recipe))
    torch.set_num_threads(threads)
