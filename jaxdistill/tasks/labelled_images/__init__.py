"""Class-conditional images: the digits of scikit-learn, and Fashion-MNIST."""
