"""Files from a trained model: patches, volumes, segmentation."""
