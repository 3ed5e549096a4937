"""The U-Net, the autoencoder and the layers of Stable Diffusion 1.x, 2.x and XL."""
